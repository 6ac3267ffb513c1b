"""Recipes laid over one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccpo.errors import UserError

PARTS = (("team",), ("task",), ("credit",))
"""Sections that name a thing by ``kind``: another kind has other arguments, so those of the old one do not carry over."""


def laid_over(under: Mapping[str, Any], over: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """``under`` with ``over`` laid on top, key by key; neither is changed."""
    merged = dict(under)
    for key, value in over.items():
        place = (*path, str(key))
        merged[key] = _one(merged.get(key), value, place)
    return merged


def _one(old: Any, new: Any, place: tuple[str, ...]) -> Any:
    if is_part(place):
        old, new = _long(old), _long(new)
        if (
            isinstance(new, Mapping)
            and isinstance(old, Mapping)
            and new.get("kind", old.get("kind")) != old.get("kind")
        ):
            old = None
    if isinstance(new, Mapping):
        return laid_over(old if isinstance(old, Mapping) else {}, new, place)
    return list(new) if isinstance(new, list) else new


def _long(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def is_part(place: tuple[str, ...]) -> bool:
    return place in PARTS or (len(place) == 3 and place[:2] == ("eval", "tasks"))


def at(path: str, value: Any) -> dict[str, Any]:
    """``at("optim.lr", 1e-4)`` is ``{"optim": {"lr": 1e-4}}``. Raises UserError for a path with an empty step."""
    steps = path.split(".")
    if not all(steps):
        raise UserError(f"{path!r} is no key of a recipe; expected path.to.key, for example optim.lr")
    nested: Any = value
    for step in reversed(steps):
        nested = {step: nested}
    return nested
