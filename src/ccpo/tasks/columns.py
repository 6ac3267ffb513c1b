r"""Which columns of a table hold the question, the answer and the options, and how a row becomes a problem.

Recognised: verl (``prompt`` messages and ``reward_model.ground_truth``), GSM8K (``answer`` ends in ``#### N``),
MATH (``problem`` and a ``solution`` with its answer in ``\boxed{}``), plain question and answer, multiple choice
(options as a list, a mapping of letters, or columns A, B, C, D; the answer as a letter, an index from 0, or the
option's text). Names are compared without regard to case.

verl's prompt holds instructions for one model ("... within \\boxed{}"). A team's own templates give the
instructions, so where a plain question stands beside the prompt it is preferred, and system messages are left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from string import ascii_uppercase
from typing import Any

from ccpo.errors import UserError, nearest
from ccpo.tasks.extract import LONGEST_ANSWER, last_boxed, same
from ccpo.types import Problem

QUESTIONS = ("question", "problem", "query", "instruction", "input", "text")
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", "correct_answer", "target", "gold", "label")
CHOICES = ("choices", "options")
CHOICE_COLUMNS = ("{}", "option_{}", "choice_{}", "op{}")
CHOICE_ANSWERS = (
    "answer_idx",
    "answerkey",
    "answer_key",
    "answer_index",
    "answer",
    "correct_option",
    "label",
    "cop",
    "target",
    "gold",
    "correct_answer",
)
IDS = ("id", "unique_id", "problem_id", "question_id", "qid", "_id", "uuid")
KEPT = ("subject", "level", "type", "category", "difficulty")


class BadRowError(ValueError):
    """A row that is no problem; the message says what was found in it."""


class Kind(StrEnum):
    CHOICE = "choice"
    GRADED = "graded"  # a verl row: its reference was made to be compared by a mathematical verifier
    SOLUTION = "solution"  # the answer is the last box of a worked solution
    PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The columns of a table. A name with dots leads into nested values. ``choices`` is one column, or one for each
    option.
    """

    kind: Kind
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    id: str | None = None
    kept: Mapping[str, str] = field(default_factory=dict)


def recognise(
    names: Iterable[str], *, question: str | None, answer: str | None, choices: str | None, id: str | None
) -> Layout:
    """The layout of a table with these columns; what the user names comes first.

    Raises UserError saying which column is missing, which there are, and how to name it.
    """
    names = list(names)
    by_case = {name.lower(): name for name in reversed(names)}
    for role, named in (("question", question), ("answer", answer), ("choices", choices), ("id", id)):
        if named is not None and not any(named == name or named.startswith(name + ".") for name in names):
            raise UserError(
                f"{role}: there is no column {named!r}; there are {', '.join(names)}." + nearest(named, names)
            )

    def first(candidates: Iterable[str]) -> str | None:
        return next((by_case[c] for c in candidates if c in by_case), None)

    verl = first(("reward_model",)) is not None and first(("prompt",)) is not None
    asked = question or first(QUESTIONS) or first(("prompt",))
    if asked is None:
        raise _missing("question", QUESTIONS, names)
    others = [name for name in names if name != asked]
    shared = {
        "question": asked,
        "id": id or first(IDS),
        "kept": {by_case[name]: name for name in KEPT if name in by_case},
    }
    options = (choices,) if choices else _choice_columns(by_case)
    if options:
        settled = answer or first(CHOICE_ANSWERS)
        if settled is None:
            raise _missing("answer", CHOICE_ANSWERS, others)
        return Layout(kind=Kind.CHOICE, answer=settled, choices=options, **shared)
    if answer is None and verl:
        return Layout(kind=Kind.GRADED, answer=by_case["reward_model"] + ".ground_truth", **shared)
    settled = answer or first(ANSWERS)
    if settled is not None:
        return Layout(kind=Kind.PLAIN, answer=settled, **shared)
    if solution := first(("solution",)):
        return Layout(kind=Kind.SOLUTION, answer=solution, **shared)
    raise _missing("answer", (*ANSWERS, "solution", "reward_model"), others)


def _missing(role: str, known: Iterable[str], columns: list[str]) -> UserError:
    """``columns`` are those that might be meant."""
    near = next((hint for name in known if (hint := nearest(name, columns))), "")
    there = ", ".join(columns) or "nothing else"
    return UserError(f"no column holds the {role}; there is {there}. Name it: {role}: COLUMN.{near}")


def _choice_columns(by_case: Mapping[str, str]) -> tuple[str, ...]:
    if named := next((by_case[name] for name in CHOICES if name in by_case), None):
        return (named,)
    for pattern in CHOICE_COLUMNS:
        columns = []
        for letter in ascii_uppercase:
            column = by_case.get(pattern.format(letter.lower()))
            if column is None:
                break
            columns.append(column)
        if len(columns) >= 2:
            return tuple(columns)
    return ()


def problem_of(fields: Mapping[str, Any], layout: Layout, *, identity: str, source: str) -> Problem:
    """The problem in a row. Raises BadRowError."""
    text = _question(_get(fields, layout.question), layout.question)
    kept = {
        name: value
        for column, name in layout.kept.items()
        if isinstance(value := fields.get(column), (str, int)) and column != layout.answer
    }
    given = _get(fields, layout.id) if layout.id else None
    if isinstance(given, (str, int)) and str(given).strip():
        identity = _encodable(str(given).strip(), str(layout.id))
    if layout.kind is Kind.CHOICE:
        options, labels = _options(fields, layout.choices)
        answer = _letter(_get(fields, layout.answer), options, labels, layout.answer)
        return Problem(
            id=identity,
            text=_with_options(text, options),
            answer=answer,
            source=source,
            meta={**kept, "choices": options},
        )
    answer = _answer(_get(fields, layout.answer), layout)
    return Problem(id=identity, text=text, answer=answer, source=source, meta=kept)


def _get(fields: Mapping[str, Any], path: str) -> Any:
    if path in fields:
        return fields[path]
    value: Any = fields
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _encodable(text: str, column: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(f"{column!r} holds bytes that are not UTF-8") from None
    return text


def _question(value: Any, column: str) -> str:
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        users = [message.get("content") for message in value if message.get("role") == "user"]
        if not users or not all(isinstance(content, str) for content in users):
            raise BadRowError(f"{column!r} is a list of messages without a text from the user")
        value = "\n\n".join(users)
    if not isinstance(value, str):
        raise BadRowError(f"{column!r} is {_described(value)}; it must be a text")
    if not value.strip():
        raise BadRowError(f"{column!r} is empty")
    return _encodable(value.strip(), column)


def _described(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _scalar(value: Any, column: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRowError(f"{column!r} is {value}; an answer is a text or a finite number")
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, (int, Decimal)):
        return str(value)
    if not isinstance(value, str):
        raise BadRowError(f"{column!r} is {_described(value)}; an answer is a text or a number")
    if not value.strip():
        raise BadRowError(f"{column!r} is empty: there is nothing to compare an answer with")
    return _encodable(value.strip(), column)


def _answer(value: Any, layout: Layout) -> str:
    answer = _scalar(value, layout.answer)
    if layout.kind is Kind.SOLUTION:
        boxed = last_boxed(answer)
        if not boxed:
            raise BadRowError(f"{layout.answer!r} has no \\boxed{{}} with the answer")
        return boxed
    if "####" in answer:
        answer = answer.rsplit("####", 1)[1].strip()
        if not answer:
            raise BadRowError(f"{layout.answer!r} has nothing after its ####")
    if len(answer) > LONGEST_ANSWER:
        raise BadRowError(f"{layout.answer!r} has {len(answer):,} characters; an answer has at most {LONGEST_ANSWER:,}")
    return answer


def _options(fields: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """The options by their letters, and the letters by the labels that the file uses."""
    labels: list[str] = []
    if len(columns) > 1:
        texts: Any = [fields.get(column) for column in columns]
        while texts and texts[-1] in (None, ""):
            texts.pop()
    else:
        texts = _get(fields, columns[0])
        if isinstance(texts, str) and texts.lstrip()[:1] in ("[", "{"):
            try:
                texts = json.loads(texts)
            except (ValueError, RecursionError):
                raise BadRowError(f"{columns[0]!r} is not a JSON list of options") from None
        if isinstance(texts, Mapping) and isinstance(texts.get("text"), list) and isinstance(texts.get("label"), list):
            labels, texts = [str(label) for label in texts["label"]], texts["text"]
        elif isinstance(texts, Mapping):
            present = {str(key): value for key, value in texts.items() if value is not None}
            if all(len(key) == 1 for key in present):
                present = dict(sorted(present.items()))
            labels, texts = list(present), list(present.values())
    where = columns[0]
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(ascii_uppercase):
        found = f"{len(texts)} of them" if isinstance(texts, list) else _described(texts)
        raise BadRowError(f"{where!r} must hold 2 to 26 options; found {found}")
    letters = ascii_uppercase[: len(texts)]
    options = {letter: _scalar(text, where) for letter, text in zip(letters, texts, strict=True)}
    marks = {letter: re.match(rf"\(?{letter}\s?[).:]\s*", option) for letter, option in options.items()}
    if all(mark and mark.end() < len(options[letter]) for letter, mark in marks.items()):
        options = {letter: option[marks[letter].end() :] for letter, option in options.items()}
    return options, dict(zip(map(str.casefold, labels), letters, strict=False))


def _letter(value: Any, options: Mapping[str, str], labels: Mapping[str, str], column: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(options):
            raise BadRowError(f"{column!r} is {value}; as an index it lies between 0 and {len(options) - 1}")
        return list(options)[value]
    answer = _scalar(value, column)
    if answer.casefold() in labels:
        return labels[answer.casefold()]
    if (mark := re.fullmatch(r"\(?([A-Za-z])[).:]?", answer)) and mark.group(1).upper() in options:
        return mark.group(1).upper()
    fitting = [letter for letter, option in options.items() if same(option) == same(answer)]
    if len(fitting) == 1:
        return fitting[0]
    if answer.isascii() and answer.isdigit() and not fitting and int(answer[:4]) < len(options):
        return list(options)[int(answer)]
    raise BadRowError(
        f"{column!r} is {answer[:60]!r}: neither a letter up to {list(options)[-1]}, nor an index, "
        "nor the text of one option"
    )


def _with_options(text: str, options: Mapping[str, str]) -> str:
    """The question with its options below it, unless it has them already."""
    if all(
        re.search(rf"(?<![A-Za-z]){letter}\W{{1,4}}{re.escape(option)}", text) for letter, option in options.items()
    ):
        return text
    return text + "\n" + "\n".join(f"{letter}. {option}" for letter, option in options.items())
