r"""Are two mathematical answers the same, and under which name is an answer counted?

Runs inside the sandbox: parsing and simplifying a text that a model wrote may take for ever. Needs sympy and
math-verify. The name of an answer (its *key*) is a string that is equal for equal answers: the exact value of a
rational, 15 significant digits of any other number, the expanded or cancelled form of an expression, the keys of
the members of a set, tuple or interval.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from ccpo.tasks.extract import bare_latex, equal_numbers, number

_LATEX = (LatexExtractionConfig(boxed_match_priority=0),)
_TEXT_ONLY = re.compile(
    r"\d\s*:\s*\d|\w_\{?\d+\}?$"
)  # ratios, times and bases: the parser would read 3:1 as 3 and 11_5 as 11
_LARGE_POWER = 5_000
_LARGE_NUMBER = 10**1000
_LARGE_POWER_OF_SUM = 50
_LARGE_EXPRESSION = 60


def judge_math(reference: str, answer: str) -> tuple[float, str | None]:
    """The score of ``answer`` and its key (that of the reference where it is right; None where it has no value,
    like 0/0).
    """
    wanted, given = bare_latex(reference), bare_latex(answer)
    wanted_key = key_of(reference)
    if wanted == given:
        return 1.0, wanted_key or wanted
    if (left := number(wanted)) and (right := number(given)):
        return (1.0, wanted_key) if equal_numbers(left, right) else (0.0, str(right[0]))
    given_key = key_of(answer)
    if given_key is not None and (wanted_key == given_key or _verified(reference, answer)):
        return 1.0, wanted_key or wanted
    return 0.0, given_key


def _verified(reference: str, answer: str) -> bool:
    if _TEXT_ONLY.search(bare_latex(reference)) or _TEXT_ONLY.search(bare_latex(answer)):
        return False
    left, right = _parsed(reference), _parsed(answer)
    if left is None or right is None or (_exact_number(left) and _exact_number(right)):
        return False  # numbers whose keys differ need no simplification to tell them apart
    return verify(left, right, timeout_seconds=None)


def _exact_number(value: Any) -> bool:
    return isinstance(value, sympy.Expr) and value.is_number and not value.has(sympy.Float, sympy.UnevaluatedExpr)


@lru_cache(maxsize=4096)
def key_of(text: str) -> str | None:
    """The name under which an answer is counted; None for what has no value (0/0) or is empty."""
    bare = bare_latex(text)
    if value := number(bare):
        return str(value[0])
    if not bare:
        return None
    if _TEXT_ONLY.search(bare) or (parsed := _parsed(text)) is None:
        return bare
    try:
        key = _key(parsed)
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return bare  # sympy has no canonical form for it
    return None if re.search(r"\b(?:nan|zoo)\b", key) else key


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    """What math-verify reads; None where it reads nothing, or where to evaluate it would not end."""
    if _is_bomb("".join(text.split())):
        return None
    found = parse("\\boxed{" + text + "}", _LATEX, parsing_timeout=None)
    return found[0] if found and not isinstance(found[0], str) and not _explodes(found[0]) else None


_EXPONENT = re.compile(r"\^(?:\{([^{}]*)\}|(\w))")
_DIGITS = re.compile(r"\d+")


def _is_bomb(text: str) -> bool:
    """Powers of powers of numbers, exponents over 5,000, factorials of large numbers: more arithmetic than an
    answer can need.
    """
    if len(re.findall(r"\^|\*\*", text)) > 40 or text.count("!") > 8 or re.search(r"\d{4,}[})]*!|[)}!]!", text):
        return True
    if re.search(r"(?:\^|\*\*)[{(]*\d+[})]*(?:\^|\*\*|!)", text):
        return True
    inner = (match.group(1) or match.group(2) for match in _EXPONENT.finditer(text))
    return any(int(digits[:8]) > _LARGE_POWER for part in inner for digits in _DIGITS.findall(part or ""))


def _explodes(value: Any) -> bool:
    """A high power of a sum would be multiplied out: (x+1)^4999."""
    powers = value.atoms(sympy.Pow)
    return any(
        p.base.is_Add and p.free_symbols and p.exp.is_Integer and abs(p.exp) > _LARGE_POWER_OF_SUM for p in powers
    )


def _key(value: Any) -> str:
    if isinstance(value, sympy.MatrixBase):
        return "[" + "; ".join(", ".join(_key(value[i, j]) for j in range(value.cols)) for i in range(value.rows)) + "]"
    if isinstance(value, sympy.FiniteSet):
        return "{" + ", ".join(sorted(_key(member) for member in value.args)) + "}"
    if isinstance(value, sympy.Interval):
        return (
            ("(" if value.left_open else "[")
            + f"{_key(value.start)}, {_key(value.end)}"
            + (")" if value.right_open else "]")
        )
    if isinstance(value, sympy.Tuple):
        return "(" + ", ".join(_key(member) for member in value) + ")"
    if isinstance(value, sympy.Union):
        return " U ".join(sorted(_key(part) for part in value.args))
    if isinstance(value, sympy.Eq) and value.lhs.is_Symbol and not value.rhs.free_symbols:  # x = 5 is the answer 5
        return _key(value.rhs)
    if isinstance(value, sympy.Expr):
        return _expression_key(value)
    return str(value)


def _expression_key(value: sympy.Expr) -> str:
    percent = sympy.UnevaluatedExpr(sympy.Rational(1, 100))
    if value.is_Mul and percent in value.args:
        value = value.func(
            *(arg for arg in value.args if arg != percent)
        )  # 9% is counted with 9, as math-verify compares them
    if value.is_number:
        return _number_key(value)
    if value.count_ops() > _LARGE_EXPRESSION or any(
        abs(p.exp) > 12 for p in value.atoms(sympy.Pow) if p.exp.is_Integer
    ):
        return str(value)
    value = value.doit()
    return str(sympy.cancel(value) if value.is_rational_function() else sympy.expand(value))


def _number_key(value: sympy.Expr) -> str:
    if value.is_Float:
        return str(sympy.Rational(str(value)))
    if value.is_Rational or value.is_infinite:
        return str(value)
    numeric = value.evalf(30)
    if numeric.is_Number and numeric.is_finite:
        if abs(numeric) > _LARGE_NUMBER:
            return str(value)
        exact = value.doit()
        if exact.is_Rational:
            return str(exact)
    return str(value.evalf(15, chop=True))
