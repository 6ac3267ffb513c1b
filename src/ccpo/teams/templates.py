r"""The prompt language: names in braces, and sections that vanish with the messages they show.

- ``{problem}`` is the problem, ``{thinker}`` the message of the turn ``thinker``, and ``{upstream}`` every message that
  the turn reads and that the template does not name itself, each as a paragraph ``NAME: text``.
- ``[[ … ]]`` is left out when a message named in it is dropped; sections do not nest. Brackets around no name at all
  are plain text.
- A dropped message outside a section is empty text.
- ``{{`` and ``}}`` are literal braces (``}}`` only where a ``{{`` is open, so that ``\boxed{\frac{1}{2}}`` stays as it
  is), and braces around anything that is not an identifier, such as ``\boxed{}``, are plain text.

Substitution is one pass: what a model wrote is never read as a template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ccpo.errors import UserError

PROBLEM, UPSTREAM = "problem", "upstream"
RESERVED = (PROBLEM, UPSTREAM)

Values = Mapping[str, str | None]
"""The problem and the messages by name; None is a dropped message, an empty text a blank one."""

_MARK = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|\[\[|\]\]")


@dataclass(frozen=True, slots=True)
class _Slot:
    name: str


@dataclass(frozen=True, slots=True)
class _Section:
    parts: tuple[str | _Slot, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parts if isinstance(p, _Slot))


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template. ``names`` are the names in it, each once, in order of appearance."""

    source: str
    parts: tuple[str | _Slot | _Section, ...]
    names: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> Template:
        """Parse ``text``. Raises :class:`~ccpo.errors.UserError` for sections that nest or do not close."""
        return _parse(text)

    @property
    def messages(self) -> tuple[str, ...]:
        """The turns whose messages it names."""
        return tuple(name for name in self.names if name not in RESERVED)

    def render(self, values: Values, reads: Sequence[str] = ()) -> str:
        """The text for ``values``; ``reads`` are the turns behind ``{upstream}``.

        Raises :class:`~ccpo.errors.UserError` for a name without a value.
        """
        known = {name: _value(values, name) for name in self.names if name != UPSTREAM}
        if UPSTREAM in self.names:
            known[UPSTREAM] = _upstream(values, [name for name in reads if name not in self.names])
        return "".join(_render(part, known) for part in self.parts)


def _value(values: Values, name: str) -> str | None:
    if name not in values:
        raise UserError(
            f"the template shows {{{name}}} but no such message was given; known: {', '.join(values) or 'none'}"
        )
    return values[name]


def _upstream(values: Values, names: Sequence[str]) -> str | None:
    said = [(name, text) for name in names if (text := _value(values, name)) is not None]
    return "\n\n".join(f"{name}: {text}" for name, text in said) if said else None


def _render(part: str | _Slot | _Section, values: Values) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, _Slot):
        return values[part.name] or ""
    if any(values[name] is None for name in part.names):
        return ""
    return "".join(_render(p, values) for p in part.parts)


@lru_cache(maxsize=512)
def _parse(text: str) -> Template:
    parts: list[str | _Slot | _Section] = []
    section: list[str | _Slot] | None = None  # the parts since an open "[["
    place, open_braces = 0, 0
    for mark in _MARK.finditer(text):
        target = parts if section is None else section
        target.append(text[place : mark.start()])
        place = mark.end()
        token = mark.group()
        if token == "{{":
            open_braces += 1
            target.append("{")
        elif token == "}}":
            target.append("}" if open_braces else "}}")
            open_braces = max(0, open_braces - 1)
        elif token == "[[":
            if section is not None:
                raise UserError(
                    f"template {_excerpt(text, mark.start())}: optional sections [[ … ]] do not nest; use two "
                    "side by side"
                )
            section = []
        elif token == "]]":
            parts.extend(_close(section))
            section = None
        else:
            target.append(_Slot(mark.group(1)))
    rest = text[place:]
    if section is None:
        parts.append(rest)
    elif any(isinstance(p, _Slot) for p in section):
        raise UserError(
            f"template {_excerpt(text, text.rindex('[['))}: the section that opens with [[ has no ]]; close it, "
            "or write '[ [' for plain brackets"
        )
    else:
        parts.extend(["[[", *section, rest])
    names = dict.fromkeys(name for part in parts for name in _names(part))
    return Template(text, tuple(p for p in parts if p != ""), tuple(names))


def _close(section: list[str | _Slot] | None) -> list[str | _Slot | _Section]:
    """What a ``]]`` makes of the parts since its ``[[``: a section, or plain text where no section is open or it names
    nothing."""
    if section is None:
        return ["]]"]
    if any(isinstance(p, _Slot) for p in section):
        return [_Section(tuple(p for p in section if p != ""))]
    return ["[[", *section, "]]"]


def _names(part: str | _Slot | _Section) -> tuple[str, ...]:
    if isinstance(part, _Slot):
        return (part.name,)
    return part.names if isinstance(part, _Section) else ()


def _excerpt(text: str, place: int) -> str:
    piece = text[max(0, place - 10) : place + 30]
    return repr(piece)
