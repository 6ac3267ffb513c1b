"""The shape of a decoder-only model and what follows from it: parameters, bytes of a token's cache, multiplications of a token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccpo.errors import UserError, nearest
from ccpo.families import FAMILIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Qwen2, Qwen3 or Llama model. ``biases``: of queries, keys and values; ``out_bias``, ``mlp_bias``: of the other matrices;
    ``qk_norm``: a norm of each head's queries and keys."""

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool
    biases: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    positions: int = 4096

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """``(in, out)`` of the seven matrices of a layer: q, k, v, o, gate, up, down."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = ((self.hidden, wide), (self.hidden, narrow), (self.hidden, narrow), (wide, self.hidden))
        return (*attention, (self.hidden, self.mlp), (self.hidden, self.mlp), (self.mlp, self.hidden))

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of a layer: a token costs twice as many operations there."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def layer_parameters(self) -> int:
        q, k, v, o, gate, up, down = (out for _, out in self.matrices)
        biases = (q + k + v) * self.biases + o * self.out_bias + (gate + up + down) * self.mlp_bias
        return self.layer_weights + biases + 2 * self.hidden + 2 * self.head_dim * self.qk_norm

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All numbers that are trained; a head that is tied to the embedding counts once."""
        return self.layers * self.layer_parameters + self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def body(self) -> int:
        """Numbers in the matrices of all layers, without embedding and head."""
        return self.layers * self.layer_weights

    @property
    def cached(self) -> int:
        """Numbers that one token leaves in the cache: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def adapter(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """Numbers of a LoRA adapter (arXiv 2106.09685) on these of the seven matrices: ``rank * (in + out)`` each."""
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        wanted = names if targets == "all-linear" else (targets,) if isinstance(targets, str) else tuple(targets)
        sizes = dict(zip(names, self.matrices, strict=True))
        unknown = next((t for t in wanted if t not in sizes), None)
        if unknown is not None:
            raise UserError(
                f"model.lora.targets: {unknown!r} is no matrix that ccpo plan knows; name some of {', '.join(names)}, "
                f"or set all-linear.{nearest(unknown, names)}"
            )
        return self.layers * sum(rank * sum(sizes[name]) for name in wanted)


def _qwen2(name: str, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, tied: bool) -> Shape:
    sizes = {"hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": hidden // heads}
    return Shape(name=name, family="qwen2", **sizes, mlp=mlp, vocab=vocab, tied=tied, biases=True, positions=32768)


def _qwen3(name: str, hidden: int, layers: int, heads: int, mlp: int, tied: bool) -> Shape:
    sizes = {"hidden": hidden, "layers": layers, "heads": heads, "kv_heads": 8, "head_dim": 128, "mlp": mlp}
    return Shape(name=name, family="qwen3", **sizes, vocab=151_936, tied=tied, qk_norm=True, positions=40960)


def _llama(name: str, hidden: int, layers: int, heads: int, head_dim: int, mlp: int, tied: bool) -> Shape:
    sizes = {"hidden": hidden, "layers": layers, "heads": heads, "kv_heads": 8, "head_dim": head_dim, "mlp": mlp}
    return Shape(name=name, family="llama", **sizes, vocab=128_256, tied=tied, positions=131_072)


PRESETS = {
    shape.name: shape
    for shape in (
        # the figures of each model's config.json on the Hugging Face hub
        _qwen2("qwen2.5-0.5b", 896, 24, 14, 2, 4_864, 151_936, True),
        _qwen2("qwen2.5-1.5b", 1_536, 28, 12, 2, 8_960, 151_936, True),
        _qwen2("qwen2.5-3b", 2_048, 36, 16, 2, 11_008, 151_936, True),
        _qwen2("qwen2.5-7b", 3_584, 28, 28, 4, 18_944, 152_064, False),
        _qwen2("qwen2.5-14b", 5_120, 48, 40, 8, 13_824, 152_064, False),
        _qwen2("qwen2.5-32b", 5_120, 64, 40, 8, 27_648, 152_064, False),
        _qwen3("qwen3-0.6b", 1_024, 28, 16, 3_072, True),
        _qwen3("qwen3-1.7b", 2_048, 28, 16, 6_144, True),
        _qwen3("qwen3-4b", 2_560, 36, 32, 9_728, True),
        _qwen3("qwen3-8b", 4_096, 36, 32, 12_288, False),
        _llama("llama-3.2-1b", 2_048, 16, 32, 64, 8_192, True),
        _llama("llama-3.2-3b", 3_072, 28, 24, 128, 8_192, True),
        _llama("llama-3.1-8b", 4_096, 32, 32, 128, 14_336, False),
    )
}


def preset(name: str, where: str) -> Shape:
    """A well-known shape by its name. Raises UserError."""
    if name.lower() not in PRESETS:
        raise UserError(
            f"{where}: found {name!r}; the shapes known by name are {', '.join(PRESETS)}; for another model give "
            f"the folder of its config.json as the model's path.{nearest(name.lower(), PRESETS)}"
        )
    return PRESETS[name.lower()]


def known_by(path: str) -> Shape | None:
    """The well-known shape whose name a hub name begins with: ``Qwen/Qwen2.5-1.5B-Instruct`` is ``qwen2.5-1.5b``."""
    last = path.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    return next((s for name, s in PRESETS.items() if last == name or last.startswith(f"{name}-")), None)


def shape_of(path: str, where: str) -> Shape:
    """The shape of the model at ``path``: a folder, a hub name whose config.json is in the local cache, or a well-known name. Nothing is
    downloaded. Raises UserError that names ``where`` the path was set, and the fix."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return from_config(folder / "config.json", where)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{where}: the model folder {path!r} does not exist; correct the path, or give --shape NAME")
    cached = _cached(path)
    if cached is not None:
        return from_config(Path(cached), where, path)
    found = known_by(path)
    if found is not None:
        return found
    raise UserError(
        f"{where}: the config of {path!r} is not on this machine and ccpo plan downloads nothing; fetch it first "
        f"(hf download {path} config.json), or say what it is like with --shape NAME ({', '.join(PRESETS)})"
    )


def _cached(path: str) -> str | None:
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(path, "config.json")
    except errors.HFValidationError:
        return None
    return found if isinstance(found, str) else None


def from_config(file: Path, where: str, name: str | None = None) -> Shape:
    """The shape in a config.json. Raises UserError where it cannot be read or is of a family that the library's own code does not run."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        family = config["model_type"]
    except FileNotFoundError:
        raise UserError(
            f"{where}: there is no {file}; give the folder of a Hugging Face model, or --shape NAME"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where}: {file} is not readable as a model's config ({type(error).__name__}: {error}); save the model again, or give "
            "--shape NAME"
        ) from None
    if family not in FAMILIES:
        raise UserError(
            f"{where}: {file} is of family {family!r}, and ccpo plan knows the formulas of {', '.join(FAMILIES)}; give the nearest "
            f"shape with --shape NAME ({', '.join(PRESETS)})"
        )
    try:
        return _read(config, family, name or file.parent.name)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{where}: {file} does not say {error} as a number; save the model again, or give --shape NAME"
        ) from None


def _read(config: Mapping[str, Any], family: str, name: str) -> Shape:
    def number(key: str) -> int:
        value = config[key]
        if type(value) is not int or value < 1:
            raise KeyError(key)
        return value

    heads = number("num_attention_heads")
    bias, default = bool(config.get("attention_bias")), 128 if family == "qwen3" else None
    return Shape(
        name=name,
        family=family,
        hidden=number("hidden_size"),
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or default or number("hidden_size") // heads,
        mlp=number("intermediate_size"),
        vocab=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        biases=family == "qwen2" or bias,
        out_bias=family != "qwen2" and bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias")),
        qk_norm=family == "qwen3",
        positions=config.get("max_position_embeddings") or 4096,
    )
