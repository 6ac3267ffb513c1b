"""Low-rank adapters on one frozen base (LoRA, arXiv 2106.09685): one adapter a policy, told apart by its name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccpo.errors import UserError, nearest
from ccpo.learner.sharding import part_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def lora_config(base_path: str, *, rank: int, alpha: float, dropout: float, targets: str | Sequence[str]) -> Any:
    """The plan of a fresh adapter; ``targets`` are module names, or "all-linear"."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_path,
    )


def read_config(folder: str | Path) -> Any:
    """The plan of an adapter that was saved. Raises UserError where it is not a LoRA."""
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{Path(folder) / CONFIG} is not readable as an adapter's configuration ({error}).") from None
    if not isinstance(config, LoraConfig):
        raise UserError(
            f"the adapter in {str(folder)!r} is {config.peft_type}, not a LoRA; give a LoRA or a whole model."
        )
    return config


def wrap(base: nn.Module, configs: Mapping[str, Any]) -> nn.Module:
    """``base`` with one adapter for each name. Raises UserError for targets that match no module."""
    from peft import get_peft_model

    first, *others = configs
    try:
        with warnings.catch_warnings():
            # peft tells of what it sets right for Conv1D, of names it would confuse in loading (here they are
            # matched from their end), and of transformers' renamed properties
            warnings.simplefilter("ignore")
            model = get_peft_model(base, configs[first], adapter_name=first)
            for name in others:
                model.add_adapter(name, configs[name])
    except ValueError as error:
        if "target modules" not in str(error).lower():
            raise
        raise UserError(_no_target(base, configs[first].target_modules)) from None
    return model.eval()


def check_targets(base: nn.Module, **settings: Any) -> None:
    """Raises UserError where the targets of :func:`lora_config`'s ``settings`` match no module of ``base``, which is not to be used afterwards."""
    with torch.random.fork_rng():
        wrap(base, {"adapter": lora_config("base", **settings)})


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of the adapter ``name``, under the names that an adapter's file gives them.

    Names are matched from their end, since an agent may be called like a module (``model``, ``mlp``).
    """
    matrix = re.compile(rf"(.*\.lora_[AB])\.{re.escape(name)}(\.weight)")
    embedding = re.compile(rf"(.*\.lora_embedding_[AB])\.{re.escape(name)}()")
    found = {}
    for key, parameter in model.named_parameters():
        if match := matrix.fullmatch(key) or embedding.fullmatch(key):
            found[match[1] + match[2]] = parameter
    return found


def save_adapter(model: Any, name: str, folder: Path) -> None:
    """Write the adapter as a folder that ``PeftModel.from_pretrained`` opens."""
    from safetensors.torch import save_file

    config = deepcopy(model.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    tensors = {key: p.detach().cpu().contiguous() for key, p in adapter_parameters(model, name).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: nn.Module, name: str, folder: Path) -> None:
    """Fill the adapter ``name`` from a folder, in place. Raises UserError where it has other tensors than the
    model's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} is not readable ({error}).") from None
    copy_into(adapter_parameters(model, name), tensors, str(folder / WEIGHTS))


def copy_into(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Overwrite each of ``parameters`` with the tensor of its name. Raises UserError unless names and shapes agree."""
    if different := set(parameters) ^ set(tensors):
        first = min(different)
        raise UserError(
            f"{where} does not fit the model: {len(different)} tensors are on one side only, the first of them "
            f"{first!r}. "
            "Was the model's path or model.lora changed?"
        )
    for key, parameter in parameters.items():
        if parameter.shape != tensors[key].shape:
            raise UserError(
                f"{where} does not fit the model: {key!r} is {list(tensors[key].shape)} there and "
                f"{list(parameter.shape)} here. "
                "Was the model's path or model.lora changed?"
            )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(part_of(tensors[key], parameter))


def copy_adapter(model: Any, name: str, copy: str) -> None:
    """Add the adapter ``copy``, frozen, with the present weights of ``name``."""
    config = deepcopy(model.peft_config[name])
    active = model.active_adapter
    model.add_adapter(copy, config)
    copy_into(adapter_parameters(model, copy), adapter_parameters(model, name), f"adapter {name!r}")
    for parameter in adapter_parameters(model, copy).values():
        parameter.requires_grad_(False)
    model.set_adapter(active)
    model.eval()


def _no_target(base: nn.Module, targets: Any) -> str:
    names = sorted(
        {
            key.rsplit(".", 1)[-1]
            for key, m in base.named_modules()
            if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
        }
    )
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    hint = next((h for w in wanted if (h := nearest(w, names))), "")
    return f"model.lora.targets {', '.join(map(repr, wanted))} match no module; the model has {', '.join(names)}.{hint}"
