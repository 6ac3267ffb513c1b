"""Prompt templates: ``{problem}`` and upstream messages by turn name, and ``[[ optional sections ]]``.

``{name}`` is replaced once; what is put in is never read as a template, so a message may hold braces. ``{{`` and ``}}`` are literal braces, and
braces around anything that is not a name (``\\boxed{}``) stay as they are. A section in ``[[ ]]`` is left out when a message named in it was dropped.
``{upstream}`` stands for every message that the turn reads, each as a paragraph ``NAME: text``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ccpo.errors import UserError

UPSTREAM = "upstream"
PROBLEM = "problem"

_TOKEN = re.compile(r"(\{\{|\}\}|\[\[|\]\]|\{[A-Za-z_][A-Za-z0-9_]*\})")


@dataclass(frozen=True, slots=True)
class Piece:
    """A literal text, or a name to be filled in; ``section`` numbers the optional section that it stands in (0: none)."""

    text: str
    is_name: bool
    section: int


@dataclass(frozen=True, slots=True)
class Filled:
    """A piece of a rendered prompt: ``name`` is None for the template's own text, and the name for text that came from outside."""

    text: str
    name: str | None = None


@dataclass(frozen=True)
class Template:
    """A parsed template. Raises UserError for a section that is nested or not closed."""

    text: str
    pieces: tuple[Piece, ...]

    @staticmethod
    def parse(text: str) -> Template:
        pieces, section, open_section = [], 0, False
        for token in _TOKEN.split(text):
            if token == "[[":
                if open_section:
                    raise UserError(f"template {text!r}: '[[' inside '[[ ]]'; optional sections do not nest")
                open_section, section = True, section + 1
            elif token == "]]" and open_section:
                open_section = False
            elif token:
                is_name = _TOKEN.fullmatch(token) is not None and token[0] == "{" and token not in ("{{", "}}")
                literal = {"{{": "{", "}}": "}"}.get(token, token)
                pieces.append(Piece(token[1:-1] if is_name else literal, is_name, section if open_section else 0))
        if open_section:
            raise UserError(f"template {text!r}: '[[' is never closed by ']]'")
        return Template(text, tuple(pieces))

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order of first use."""
        return tuple(dict.fromkeys(p.text for p in self.pieces if p.is_name))

    def fill(self, values: Mapping[str, str | None]) -> list[Filled]:
        """The rendered pieces. ``None`` is a dropped message, an empty string a blank one."""
        dropped = {p.section for p in self.pieces if p.is_name and p.section and values[p.text] is None}
        return [
            Filled((values[p.text] or "") if p.is_name else p.text, p.text if p.is_name else None)
            for p in self.pieces
            if not p.section or p.section not in dropped
        ]

    def render(self, values: Mapping[str, str | None]) -> str:
        return "".join(piece.text for piece in self.fill(values))


def upstream(messages: Mapping[str, str | None]) -> str | None:
    """The text of ``{upstream}``: a paragraph for each message that is not dropped; None where all are."""
    present = {name: text for name, text in messages.items() if text is not None}
    return "\n\n".join(f"{name}: {text}" for name, text in present.items()) if present else None


def strip_boxed(text: str) -> str:
    """``text`` without a trailing ``\\boxed{…}`` (and the ``$`` or full stop around it), so that a thought does not hand over its answer.

    Linear in the length of ``text``, whatever it holds.
    """
    end = len(text.rstrip(" \t\r\n$."))
    start = text.rfind("\\boxed{", 0, end)
    if start < 0 or end == 0 or text[end - 1] != "}":
        return text
    # several boxes may be nested at the end; the outermost one that closes exactly at `end` is the one to strip
    depth, opened = 0, -1
    for i in range(end - 1, -1, -1):
        if text[i] == "}":
            depth += 1
        elif text[i] == "{":
            depth -= 1
            if depth == 0:
                opened = i
                break
    if opened < 0 or not text[:opened].endswith("\\boxed"):
        return text
    return text[: opened - len("\\boxed")].rstrip(" \t\r\n$")
