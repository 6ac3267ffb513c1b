"""Models and tokenizers from Hugging Face names or folders; what can go wrong, in one sentence with the fix."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ccpo.errors import UserError

PROBE_SECONDS = 10.0


def load_model(
    path: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """The causal language model at ``path`` in eval mode (no dropout: its log-probs must be those of the sampler).

    ``attention="auto"`` is eager on a CPU (the bfloat16 backward of SDPA is pathologically slow there) and the model's
    best elsewhere. Weights are read from safetensors only, never unpickled. Raises UserError for a path that is absent
    or cannot be reached, a model of another kind, weights that are missing or broken, and an attention that is not
    installed.
    """
    from transformers import AutoModelForCausalLM

    chosen = _attention(attention, device)
    options = {} if chosen is None else {"attn_implementation": chosen}
    with quiet(), _explained(path):
        model, report = AutoModelForCausalLM.from_pretrained(
            absolute(path),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **_where(path),
            **options,
        )
    if report["missing_keys"]:
        raise UserError(
            f"the weights of {path!r} are incomplete: {len(report['missing_keys'])} tensors are missing, the first of "
            "them "
            f"{min(report['missing_keys'])!r}; download or save the model again (a random layer would train in "
            "silence)."
        )
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"model.gradient_checkpointing: {type(model).__name__} does not support it; set it to false."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it has another name in newer versions of transformers
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with _explained(path, "generation config of"):
        _make_savable(model)
    return model.to(device).eval()


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer at ``path``. It needs an end token; a padding token it does not need (padding is done by mask).

    Raises UserError where there is no tokenizer, an empty one, or one without an end token.
    """
    from transformers import AutoTokenizer

    with quiet(), _explained(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(absolute(path), trust_remote_code=trust_remote_code, **_where(path))
    if len(tokenizer.get_vocab()) == len(tokenizer.get_added_vocab()):
        # what some families make of a folder without tokenizer files, in silence
        raise UserError(f"{path!r} holds no tokenizer; save it there with tokenizer.save_pretrained.")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {path!r} has no end token, so no completion could ever end; set eos_token in its "
            "tokenizer_config.json."
        )
    return tokenizer


def adapter_base(path: str) -> str | None:
    """The base model of the LoRA adapter in the folder ``path``; None where the folder holds no adapter."""
    file = Path(path).expanduser() / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"{file} is not readable as an adapter's configuration ({error}).") from None
    if not isinstance(base, str) or not base:
        raise UserError(f"{file} does not name its base model; add base_model_name_or_path.")
    return base


def check_device(device: torch.device) -> None:
    """Raises UserError where the device is not there."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "the device is 'cuda', but torch sees no CUDA device here; use 'cpu', or install a CUDA build of torch."
        )


def absolute(path: str) -> str:
    """A local folder as an absolute path, so that what is saved can be opened from anywhere; a hub name as it is."""
    local = Path(path).expanduser()
    return str(local.resolve()) if local.is_dir() else path


def _attention(wanted: str, device: torch.device) -> str | None:
    if wanted == "auto":
        return "eager" if device.type == "cpu" else None
    if wanted == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            "model.attention is 'flash_attention_2', which is not installed; set model.attention: auto, or install it "
            "(pip install flash-attn, on a machine with CUDA)."
        )
    return wanted


def _where(path: str) -> dict[str, Any]:
    """Options that keep a hub name from being asked for again and again where the hub cannot be reached.

    Raises UserError for a folder that does not exist, an unknown name, and an unreachable one that is not in the cache.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return {"local_files_only": True}
    if local.exists():
        raise UserError(f"the model {path!r} is a file; give the folder that holds config.json and the weights.")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"the model folder {path!r} does not exist (looked at {local.resolve()}); correct the path.")
    return _hub(path)


def _hub(name: str) -> dict[str, Any]:
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        huggingface_hub.model_info(name, timeout=PROBE_SECONDS)
    except errors.HFValidationError as error:
        raise UserError(f"{name!r} is neither a local folder nor a model name: {error}") from None
    except errors.GatedRepoError:
        raise UserError(
            f"the model {name!r} is gated; accept its terms on huggingface.co and log in (hf auth login)."
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"there is no model {name!r}: neither a local folder nor a public model on huggingface.co (a private one "
            "needs hf auth login)."
        ) from None
    except Exception as error:  # the hub's client lets its HTTP library's own errors through, and that library changes
        if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            return {"local_files_only": True}
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"the model {name!r} is no local folder, is not in the cache {constants.HF_HUB_CACHE}, and huggingface.co "
            "cannot be "
            f"reached ({reason}); give a local folder, or point HF_HOME at a cache that holds it."
        ) from None
    return {}


@contextmanager
def _explained(path: str, what: str = "model") -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise UserError(f"the weights of {path!r} are broken ({_short(error)}); download or save them again.") from None
    except (OSError, ImportError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_reason(path, what, error)) from error


def _reason(path: str, what: str, error: Exception) -> str:
    text = str(error)
    if "Unrecognized configuration class" in text and what == "model":
        kind = re.search(r"(\w+)'>", text)
        return f"{path!r} is not a causal language model{f' ({kind[1]})' if kind else ''}; choose one that is."
    if "safetensors" in text and "no file named" in text:
        return (
            f"{path!r} holds no weights in safetensors (pickled ones are not read); save it again with save_pretrained."
        )
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{path!r} does not fit in the device's memory; use model.weights: bfloat16, model.sharing: lora, or a "
            "smaller model."
        )
    if "trust_remote_code" in text:
        return f"{path!r} brings code of its own; set model.trust_remote_code: true if you trust it."
    return f"the {what} {path!r} cannot be loaded: {_short(error)}"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:299] + '…'}"


def _make_savable(model: Any) -> None:
    """Many published models carry sampling settings beside ``do_sample=False``, which transformers refuses to save."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
        settings.validate(strict=True)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no reports of the libraries while a model is loaded or saved."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
