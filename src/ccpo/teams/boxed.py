r"""Strips a trailing ``\boxed{…}`` from a thought, so that its reader gets the reasoning and not the answer (CCPO v2,
arXiv 2603.21563)."""

from __future__ import annotations

_BOX = "\\boxed"
_CLOSERS = {"$": "$", "\\]": "\\[", "\\)": "\\("}  # the end of a formula and its beginning


def strip_boxed(text: str) -> str:
    r"""``text`` without the boxed expressions at its end, or ``text`` itself where there is none.

    Full stops and spaces after the box go with it, and the ``$ … $``, ``\[ … \]`` or ``\( … \)`` that holds nothing but
    the box. Braces are matched, escaped ones (``\{``) do not count. Linear in the length of the text, whatever it
    holds.
    """
    end = len(text)
    while (start := _box_before(text, end)) is not None:
        end = start
    return text if end == len(text) else text[:end]


def _box_before(text: str, end: int) -> int | None:
    """Where the text ends once the box that ends at ``end`` is taken off; None where no box ends there."""
    stop, closers = _tail(text, end)
    if stop == 0 or text[stop - 1] != "}" or _escaped(text, stop - 1):
        return None
    brace = _opening(text, stop - 1)
    if brace is None or not text.endswith(_BOX, 0, brace):
        return None
    start = _skip_space(text, brace - len(_BOX))
    for closer in closers:
        opener = _CLOSERS[closer]
        if not text.endswith(opener, 0, start):
            break
        start = _skip_space(text, start - len(opener))
    return start


def _tail(text: str, end: int) -> tuple[int, list[str]]:
    """Step back over spaces, full stops and formula ends; returns the place and the formula ends, innermost first."""
    closers: list[str] = []
    while end > 0:
        if text[end - 1].isspace() or text[end - 1] == ".":
            end -= 1
            continue
        closer = next((c for c in _CLOSERS if text.endswith(c, 0, end)), None)
        if closer is None:
            break
        closers = [closer, *closers[:1]]  # '$$' is two; a longer run is no formula
        end -= len(closer)
    return end, closers


def _opening(text: str, close: int) -> int | None:
    """The place of the brace that matches the one at ``close``."""
    depth = 0
    for i in range(close, -1, -1):
        if text[i] in "{}" and not _escaped(text, i):
            depth += 1 if text[i] == "}" else -1
            if depth == 0:
                return i
    return None


def _escaped(text: str, place: int) -> bool:
    """Whether an odd number of backslashes stands before ``place``."""
    before = place
    while before > 0 and text[before - 1] == "\\":
        before -= 1
    return (place - before) % 2 == 1


def _skip_space(text: str, end: int) -> int:
    while end > 0 and text[end - 1].isspace():
        end -= 1
    return end
