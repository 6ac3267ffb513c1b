"""Finds the answer in what a model wrote. Standard library only; every function is linear in the text's length."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

TAIL = 20_000
"""Characters from the end of a text that are read: an answer comes last, and a verdict must be cheap."""

LONGEST_ANSWER = 1_000
"""Characters. What is longer is not an answer but an essay: an abstention."""

_MARKER = re.compile(r"(?i)(?:answer\s{0,4}(?:is\b|[:=])|####)[ \t]{0,8}:?")
_ANSWER_TAG = re.compile(r"(?i)<(/?)answer>")


def clean(text: str) -> str:
    """The end of ``text`` without NUL bytes and half surrogate pairs (which no file or pipe takes)."""
    return text[-TAIL:].replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` (or ``\fbox``, ``\boxed 5``) whose braces close, or None."""
    opened: list[int | None] = []  # for each open brace, where a box's content starts; None for other braces
    found: tuple[int, int] | None = None
    i = 0
    while i < len(text):
        char = text[i]
        if char == "\\":
            box = next((name for name in ("\\boxed", "\\fbox") if text.startswith(name, i)), None)
            if box is None:
                i += 2  # an escaped character, braces included
                continue
            i += len(box)
            while i < len(text) and text[i] == " ":
                i += 1
            if text[i : i + 1] == "{":
                opened.append(i + 1)
                i += 1
            elif bare := re.match(r"-?\w+", text[i : i + 40]):
                found = (i, i + bare.end())
            continue
        if char == "{":
            opened.append(None)
        elif char == "}" and opened:
            start = opened.pop()
            if start is not None and (found is None or start > found[0]):
                found = (start, i)
        i += 1
    return text[found[0] : found[1]].strip() if found else None


def after_marker(text: str) -> str | None:
    """The line that follows the last "answer is", "Answer:" or "####"; None where there is no such mark."""
    marks = list(_MARKER.finditer(text))
    if not marks:
        return None
    line = text[marks[-1].end() :].strip().split("\n", 1)[0]
    return line.lstrip(" *_`").rstrip(" *_`.") or None


def tagged(text: str) -> str | None:
    """What stands in the last closed ``<answer>...</answer>``, or None."""
    start = found = None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag.group(1):
            start = tag.end()
        elif start is not None:
            found, start = text[start : tag.start()].strip(), None
    return found


def last_line(text: str) -> str:
    return text.rstrip().rsplit("\n", 1)[-1].strip()


def same(text: str) -> str:
    """The form under which two plain texts are one answer: compatibility characters, case and white space folded."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|rm)\s?\{([^{}]{0,200})\}")
_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|,|;|!|:| |quad|qquad)(?![a-zA-Z])|\$|~|\^\{?\\circ\}?|\\\(|\\\)|\\\[|\\\]"
)
_SPACE = re.compile(r"(?<![^\W_])\s+|\s+(?![^\W_])")  # not between two letters or digits: "1 1/2" is not 11/2
_ONE_IN_BRACES = re.compile(r"([_^])\{(\w)\}")


def bare_latex(text: str) -> str:
    r"""A LaTeX answer without what only sets the type: ``$``, ``\left``, thin spaces, ``\text{}``, white space, a
    final stop.
    """
    text = text.strip().replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\$", "").replace("\\%", "%")
    text = _DROPPED.sub("", _WRAPPED.sub(r"\1", text))
    text = _ONE_IN_BRACES.sub(r"\1\2", _SPACE.sub("", text)).rstrip(".")
    return text.casefold() if re.fullmatch(r"[^\W\d_][^\W\d_'.-]+", text) else text


_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d{1,60})?(?:\.\d{1,60})?"
_NUMBER = re.compile(rf"([+-]?)({_DECIMAL})")
_RATIO = re.compile(r"([+-]?)(?:\\frac(?:\{(-?\d{1,60})\}\{(-?\d{1,60})\}|(\d)(\d))|(-?\d{1,60})/(\d{1,60}))")


def number(text: str) -> tuple[Fraction, bool] | None:
    r"""The exact value of a decimal or a ratio of integers (``1,000``, ``.5``, ``-\frac{1}{2}``, ``1/2``) in the
    form of :func:`bare_latex`, and whether it was written as a decimal; None for anything else, a zero denominator
    included.
    """
    if (match := _NUMBER.fullmatch(text)) and match.group(2):
        digits = match.group(2).replace(",", "")
        value = Fraction(digits + "0" if digits.endswith(".") else digits)
        return (-value if match.group(1) == "-" else value), "." in digits
    if match := _RATIO.fullmatch(text):
        top, bottom = (int(part) for part in match.groups()[1:] if part is not None)
        if bottom == 0:
            return None
        return Fraction(-top if match.group(1) == "-" else top, bottom), False
    return None


def equal_numbers(left: tuple[Fraction, bool], right: tuple[Fraction, bool]) -> bool:
    """Exactly equal; or, where one is written as a decimal, equal when both are rounded to six places."""
    if left[0] == right[0]:
        return True
    return (left[1] or right[1]) and round(left[0], 6) == round(right[0], 6)
