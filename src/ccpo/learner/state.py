"""A run's extra state as JSON and tensors: what was saved is what is loaded, floats to the last bit, and no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSOR = "__tensor__"
JSON_FILE, TENSOR_FILE = "state.json", "state.safetensors"


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write JSON-able values and tensors, nested as they are. Raises ValueError for what would not come back as it went
    (a key that is no string, an object of another kind), naming its place."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    plain = _encode(state, "state", tensors)
    (folder / JSON_FILE).write_text(json.dumps(plain), encoding="utf-8")
    save_file(tensors, folder / TENSOR_FILE)


def read_state(folder: Path) -> dict[str, Any]:
    """What :func:`write_state` wrote; tuples come back as lists."""
    from safetensors.torch import load_file

    return _decode(json.loads((folder / JSON_FILE).read_text(encoding="utf-8")), load_file(folder / TENSOR_FILE))


def random_state() -> dict[str, Any]:
    """The state of torch's generators, of the CPU and each CUDA device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set torch's generators; CUDA's only where there are as many devices as there were."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {TENSOR: place}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == TENSOR:
                raise ValueError(f"{place} has the key {key!r}; a checkpoint's keys are strings other than {TENSOR!r}")
        return {key: _encode(entry, f"{place}.{key}", tensors) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(entry, f"{place}[{i}]", tensors) for i, entry in enumerate(value)]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise ValueError(
        f"{place} is a {type(value).__name__}, which a checkpoint cannot keep; make it plain JSON or a tensor"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(entry, tensors) for entry in value]
    if isinstance(value, dict):
        return tensors[value[TENSOR]] if set(value) == {TENSOR} else {k: _decode(v, tensors) for k, v in value.items()}
    return value
