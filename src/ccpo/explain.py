"""Pydantic's complaints as sentences for the person who wrote the recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ccpo.errors import nearest


def explain(error: ValidationError, model: type[BaseModel], where: str, data: Any, inside: str = "") -> str:
    """Pydantic's complaints about ``data`` as sentences: the path of the key, what was found, what is allowed, the
    nearest name. ``inside`` is the path of ``data`` itself in the recipe.
    """
    return "\n".join(f"{where}: {_sentence(e, model, data, inside)}" for e in error.errors())


def _sentence(e: Mapping[str, Any], model: type[BaseModel], data: Any, inside: str) -> str:
    keys = _keys(e["loc"], data, missing=e["type"] == "missing")
    path = ".".join([inside, *keys] if inside else keys)
    if e["type"] == "extra_forbidden":
        allowed = _keys_at(model, e["loc"][:-1])
        return f"{path}: unknown key. Allowed: {', '.join(allowed)}.{nearest(keys[-1], allowed)}"
    if e["type"] == "missing":
        return f"{path}: this key is required."
    message = e["msg"].removeprefix("Value error, ").rstrip(".") + "."
    if e["type"] == "value_error" and isinstance(e["input"], Mapping):
        return f"{path}: {message}" if path else message  # several keys together: the message names them
    if e["type"] in ("model_type", "dict_type"):
        message = "Input should be a mapping of keys and values."
    found = repr(e["input"])
    found = found if len(found) <= 80 else found[:79] + "…"
    hint = ""
    if e["type"] == "literal_error" and isinstance(e["input"], str):
        hint = nearest(e["input"], re.findall(r"'([^']+)'", e["ctx"]["expected"]))
    return f"{path or 'recipe'}: found {found}. {message}{hint}"


def _keys(loc: Sequence[Any], data: Any, *, missing: bool) -> list[str]:
    """The keys of a place in ``data``: pydantic's location without the names of types that it puts in between."""
    keys = []
    for place, step in enumerate(loc):
        known = (isinstance(data, Mapping) and step in data) or (
            isinstance(data, list | tuple) and isinstance(step, int)
        )
        if known and not (isinstance(data, list | tuple) and step >= len(data)):
            data = data[step]
        elif not (missing and place == len(loc) - 1):
            continue
        word = str(step)
        keys.append(word if word.isprintable() and word else repr(word))
    return keys


def _keys_at(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """The keys that are allowed at a place of ``model``."""
    current: Any = model
    for step in loc:
        if get_origin(current) is dict:
            current = get_args(current)[1]
        elif step in getattr(current, "model_fields", {}):
            current = current.model_fields[step].annotation
        if get_origin(current) is not dict:
            current = next((a for a in get_args(current) if hasattr(a, "model_fields")), current)
    return list(getattr(current, "model_fields", {}))
