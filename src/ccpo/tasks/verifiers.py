r"""Reads an answer in a text and compares it with the reference: exact, multiple choice, mathematics.

Every verifier reads the last :data:`~ccpo.tasks.extract.TAIL` characters only, gives an abstention
(``answer=None``, score 0) where it finds no answer, and never raises, whatever the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ccpo.errors import UserError, nearest
from ccpo.tasks.base import Pair, Verifier
from ccpo.tasks.extract import (
    LONGEST_ANSWER,
    after_marker,
    bare_latex,
    clean,
    equal_numbers,
    last_boxed,
    last_line,
    number,
    same,
    tagged,
)
from ccpo.tasks.sandbox import Outcome, run_shared
from ccpo.types import Problem, Verdict, VerdictStatus

_ABSTAINED = Verdict(score=0.0, answer=None, status=VerdictStatus.NO_ANSWER)

Where = Literal["auto", "boxed", "marker", "last_line", "last_word", "last_character", "whole"]


def exact_verdict(problem: Problem, text: str, where: Where = "auto") -> Verdict:
    r"""1 where the answer is the reference, white space, case and compatibility characters folded.

    ``where`` is the answer? ``auto``: in the last ``\boxed{}``, else after the last "answer is", "Answer:" or
    "####", else the whole text if it is the reference, else its last line. The others name one place.
    """
    text = clean(text)
    wanted = same(problem.answer)
    found = same(_answer_at(text, where, wanted) or "")
    if not found or len(found) > LONGEST_ANSWER:
        return _ABSTAINED
    return Verdict(score=float(found == wanted), answer=found)


def _answer_at(text: str, where: Where, wanted: str) -> str | None:
    if where == "boxed":
        return last_boxed(text)
    if where == "marker":
        return after_marker(text)
    if where == "whole":
        return text
    if where == "last_word":
        return (text.split() or [None])[-1]
    if where == "last_character":
        return text.rstrip()[-1:]
    if where == "last_line" or same(text) == wanted:
        return last_line(text) if where == "last_line" else text
    boxed = last_boxed(text)
    return boxed if boxed is not None else (after_marker(text) or last_line(text))


_MARKED_LETTER = re.compile(r"[\s(\[{*$]*(?:\\(?:text|textbf|mathrm|mathbf)\s?\{)?[\s(*]*([A-Za-z])(?![A-Za-z0-9'])")
_LONE_LETTER = re.compile(r"[\s(\[*$]*([A-Za-z])[\s)\].:*$]*")
_LEADING_LETTER = re.compile(r"[\s(\[*]*([A-Za-z])[).:\]]")
_PARENTHESISED = re.compile(r"[(\[]([A-Z])[)\]]")
_FINAL_LETTER = re.compile(r"(?<![A-Za-z0-9'.])([A-Z])[\s).\]*]*\Z")
_OTHER_LETTER = re.compile(r"(?:\s*(?:,|/|;|&|\bor\b|\band\b)\s*)[(\[*]*([A-Za-z])(?![A-Za-z0-9'])")


def choice_verdict(problem: Problem, text: str) -> Verdict:
    r"""1 where the letter that the text settles on is the reference's.

    Read in this order: the last ``\boxed{}``; what follows the last "answer is", "Answer:" or "####"; the whole
    last line; the last "(B)"; a bare capital at the very end; a letter with a stop or bracket that heads the last
    line. Only letters of the problem's own options (``meta["choices"]``, A–D where it has none) count; two letters
    in one place are an abstention.
    """
    text = clean(text)
    choices = _choices(problem)
    letter = _letter(text, choices)
    if letter is None:
        return _ABSTAINED
    return Verdict(score=float(letter == problem.answer.strip().upper()), answer=letter)


def _choices(problem: Problem) -> dict[str, str]:
    choices = problem.meta.get("choices")
    if isinstance(choices, Mapping) and choices:
        return {str(letter).upper(): same(str(option)) for letter, option in choices.items()}
    return dict.fromkeys("ABCD", "")


def _letter(text: str, choices: Mapping[str, str]) -> str | None:
    if boxed := last_boxed(text):
        return _letter_in(boxed, choices) or None
    if (marked := after_marker(text)) and (letter := _letter_in(marked, choices)) is not None:
        return letter or None
    line = last_line(text)
    if (lone := _LONE_LETTER.fullmatch(line)) and lone.group(1).upper() in choices:
        return lone.group(1).upper()
    if option := _option_of(line, choices):
        return option
    if (found := _PARENTHESISED.findall(text)) and found[-1] in choices:
        return found[-1]
    final = _FINAL_LETTER.search(text.rstrip()[-60:])
    if final and final.group(1) in choices:
        return final.group(1)
    lead = _LEADING_LETTER.match(line)
    return lead.group(1).upper() if lead and lead.group(1).upper() in choices else None


def _letter_in(place: str, choices: Mapping[str, str]) -> str | None:
    """The letter at the head of an answer, or of the option that is written out there; "" where there are two."""
    if option := _option_of(place, choices):
        return option
    head = _MARKED_LETTER.match(place)
    if head is None or head.group(1).upper() not in choices:
        return None
    letter, rest = head.group(1).upper(), place[head.end() :]
    if head.group(1).islower() and rest.strip(" .)]}*$:"):
        return None  # "a dog" is no answer A
    other = _OTHER_LETTER.match(rest.lstrip("})]* "))
    return "" if other and other.group(1).upper() in choices and other.group(1).upper() != letter else letter


def _option_of(line: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the one option whose text the line is, with its letter before it or not."""
    said = same(line).strip(" .*$")
    lead = _LEADING_LETTER.match(line)
    if (
        lead
        and (option := choices.get(lead.group(1).upper()))
        and option.strip(" .*$") == same(line[lead.end() :]).strip(" .*$")
    ):
        return lead.group(1).upper()
    fitting = [letter for letter, option in choices.items() if option and option.strip(" .*$") == said]
    return fitting[0] if len(fitting) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Exact:
    """:func:`exact_verdict` with its place chosen."""

    where: Where = "auto"

    def __call__(self, problem: Problem, text: str) -> Verdict:
        return exact_verdict(problem, text, self.where)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """:func:`choice_verdict`."""

    def __call__(self, problem: Problem, text: str) -> Verdict:
        return choice_verdict(problem, text)


@dataclass(frozen=True, kw_only=True)
class Math:
    r"""1 where math-verify finds the answer equal to the reference (``1/2``, ``0.5``, ``\frac12``; decimals to six
    places).

    The answer is read from the last ``\boxed{}``; unless ``boxed_only``, else from what follows the last "####",
    "answer is" or "Answer:", else from a last line that is a plain number. Right answers are counted under the
    reference's own key, so that votes for them are one class. Numbers are compared here; everything else in a
    process of its own, ``seconds`` for each (see :mod:`ccpo.tasks.sandbox`).
    """

    seconds: float = 5.0
    boxed_only: bool = False

    def __call__(self, problem: Problem, text: str) -> Verdict:
        return self.verify_many([(problem, text)])[0]

    def verify_many(self, pairs: Sequence[Pair]) -> list[Verdict]:
        verdicts: dict[tuple[str, str], Verdict] = {}
        wanted = [(problem.answer, self._answer(text)) for problem, text in pairs]
        waiting: list[tuple[str, str]] = []
        for key in dict.fromkeys((reference, answer) for reference, answer in wanted if answer is not None):
            quick = _quick(*key)
            if quick is None:
                waiting.append(key)
            else:
                verdicts[key] = quick
        items = [{"reference": reference, "answer": answer} for reference, answer in waiting]
        for key, outcome in zip(waiting, run_shared("math", items, self.seconds) if items else [], strict=True):
            verdicts[key] = _from_outcome(outcome)
        return [_ABSTAINED if answer is None else verdicts[reference, answer] for reference, answer in wanted]

    def _answer(self, text: str) -> str | None:
        text = clean(text)
        found = last_boxed(text)
        if found is None and not self.boxed_only:
            found = _settled(after_marker(text))
            if found is None and number(bare_latex(last_line(text)[-LONGEST_ANSWER:])):
                found = last_line(text)
        return found if found and len(found) <= LONGEST_ANSWER else None


_INLINE = re.compile(r"\$([^$]+)\$|\\\(([^$]+?)\\\)")


def _settled(place: str | None) -> str | None:
    """The formula or the number at the head of a sentence: 5 of "5 because ..."."""
    if place is None:
        return None
    if inline := _INLINE.search(place):
        return inline.group(1) or inline.group(2)
    head, _, rest = place.partition(" ")
    head = head.rstrip(".,;")
    return head if rest[:1].isalpha() and number(bare_latex(head)) else place


def _quick(reference: str, answer: str) -> Verdict | None:
    """The verdict where both are plain numbers; None where it takes more."""
    wanted, given = number(bare_latex(reference)), number(bare_latex(answer))
    if wanted is None or given is None:
        return None
    right = equal_numbers(wanted, given)
    return Verdict(score=float(right), answer=str(wanted[0] if right else given[0]))


def _from_outcome(outcome: Outcome) -> Verdict:
    if outcome.status is not VerdictStatus.OK:
        return Verdict(score=0.0, answer=None, status=outcome.status)
    score, answer = outcome.value
    return _ABSTAINED if answer is None else Verdict(score=score, answer=answer)


VERIFIERS = {"exact": Exact, "choice": Choice, "math": Math}


def make_verifier(name: str, seconds: float = 5.0) -> Verifier:
    """The verifier called ``name``; ``seconds`` is the time limit of one verdict. Raises UserError for an unknown
    name.
    """
    if name not in VERIFIERS:
        raise UserError(
            f"there is no verifier {name!r}; there are {', '.join(VERIFIERS)}, and auto." + nearest(name, VERIFIERS)
        )
    return Math(seconds=seconds) if name == "math" else VERIFIERS[name]()


def gym_answer(text: str) -> str | None:
    r"""What reasoning-gym's scorer is given: the last ``<answer>``, else the last ``\boxed{}``, else the line after
    a marker, else all of a text.
    """
    text = clean(text)
    for found in (tagged(text), last_boxed(text), after_marker(text)):
        if found is not None:
            return found
    return text.strip() or None
