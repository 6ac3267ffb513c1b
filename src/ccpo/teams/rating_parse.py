"""Reads the shares out of a rating (SEPO, arXiv 2603.21563v2). What a model wrote is not trusted: nothing is evaluated, time is
linear in the length of the text, and whatever cannot be read stands for equal shares."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

OUTCOMES = {"correct": "correct", "wrong": "wrong", "incorrect": "wrong"}

# Every repetition in these patterns is bounded, so that no text makes them slow.
_GAP = r"[\s\"'*]{0,8}"
_NUMBER = r"([0-9]{0,3}\.?[0-9]{1,6}\s?%?)"
_OUTCOME = re.compile(rf"\boutcome\b{_GAP}(?:[:=]|\bis\b){_GAP}({'|'.join(OUTCOMES)})\b", re.IGNORECASE)
_LIST = re.compile(rf"\b(?:pair|shares)\b{_GAP}(?:[:=]|\bis\b){_GAP}[\[(]([^\[\]()]{{1,400}})[\])]", re.IGNORECASE)


def key_of(K: int) -> str:
    """What a rating calls the shares of ``K`` agents."""
    return "pair" if K == 2 else "shares"


def parse_rating(
    text: str, outcome: str, agents: Sequence[str], *, strict: bool = False
) -> tuple[tuple[float, ...], bool]:
    """The shares that a rating names, in the order of ``agents``, and whether it is valid.

    A rating is valid if it names the right ``outcome`` ("correct" or "wrong"; it may say "incorrect") and shares from the
    allowed set: for two agents the nine pairs (0.9, 0.1) … (0.1, 0.9); for any other number tenths from 0 to 1 that sum to
    1, so that a team of many can say that an agent had no part. Everything else is invalid and gives equal shares.

    ``strict`` reads a lone JSON object, which may stand in a code fence: ``{"outcome": …, "pair": […]}`` (two agents) or
    ``{"outcome": …, "shares": […]}``. Otherwise the first JSON object in the text that has such a key is read (shares may
    also be a mapping by agent), and where there is none, phrases: ``outcome: correct``, ``pair: [0.2, 0.8]``,
    ``Thinker 80%, Solver 20%``. An object that was cut off is read as phrases.
    """
    said = _lone_object(text) if strict else _first_object(text)
    if said is not None:
        word, shares = said.get("outcome"), _listed(said, agents, strict)
    elif strict:
        word = shares = None
    else:
        found = _OUTCOME.search(text)
        word, shares = found and found[1], _phrased(text, agents)
    allowed = _allowed(shares, len(agents))
    if allowed is None or not isinstance(word, str) or OUTCOMES.get(word.strip().lower()) != outcome:
        return equal_shares(len(agents)), False
    return allowed, True


def equal_shares(K: int) -> tuple[float, ...]:
    return (1 / K,) * K


def _allowed(shares: Sequence[Any] | None, K: int) -> tuple[float, ...] | None:
    """The shares as exact tenths; None where they are not of the allowed set."""
    if shares is None or len(shares) != K:
        return None
    for share in shares:  # the range first: a huge number is not multiplied, and NaN is in no range
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            return None
    tenths = [round(10 * share) for share in shares]
    if any(abs(10 * share - tenth) > 1e-6 for share, tenth in zip(shares, tenths, strict=True)):
        return None
    if sum(tenths) != 10 or (K == 2 and 0 in tenths):
        return None
    return tuple(tenth / 10 for tenth in tenths)


def _lone_object(text: str) -> dict[str, Any] | None:
    body = text.strip()
    if body.startswith("```") and body.endswith("```") and "\n" in body:
        language, _, body = body[3:-3].partition("\n")
        if language.strip().lower() not in ("", "json"):
            return None
    return _object(body)


def _first_object(text: str) -> dict[str, Any] | None:
    return next((o for o in map(_object, _braced(text)) if o and o.keys() & {"outcome", "pair", "shares"}), None)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, a number of too many digits, nested too deeply
        return None
    return value if isinstance(value, dict) else None


def _braced(text: str) -> Iterator[str]:
    """Pieces from a brace to the one that closes it, side by side; braces in JSON strings do not count."""
    depth = start = 0
    quoted = escaped = False
    for i, c in enumerate(text):
        if quoted:
            quoted, escaped = escaped or c != '"', c == "\\" and not escaped
        elif c == "{":
            start = start if depth else i
            depth += 1
        elif depth and c == '"':
            quoted = True
        elif depth and c == "}":
            depth -= 1
            if not depth:
                yield text[start : i + 1]


def _listed(said: Mapping[str, Any], agents: Sequence[str], strict: bool) -> Sequence[Any] | None:
    """The shares of a JSON object as a list."""
    key = key_of(len(agents))
    value = said.get(key) if strict else said.get(key, said.get("shares", said.get("pair")))
    if isinstance(value, dict) and not strict:
        by_name = {name.lower(): share for name, share in value.items()}
        value = [by_name.get(agent.lower()) for agent in agents] if len(by_name) == len(agents) else None
    return value if isinstance(value, list) else None


def _phrased(text: str, agents: Sequence[str]) -> list[float] | None:
    """The shares that a text names outside JSON: a list in brackets, or a number after each agent's name."""
    if found := _LIST.search(text):
        written = [re.fullmatch(_NUMBER, piece.strip()) for piece in found[1].split(",")]
    else:
        written = [
            re.search(rf"(?<![\w-]){re.escape(agent)}(?![\w-])[\s:=\"'*]{{0,8}}{_NUMBER}", text, re.IGNORECASE)
            for agent in agents
        ]
    return [_number(match[1]) for match in written] if all(written) else None


def _number(text: str) -> float:
    return float(text.rstrip("% \n\t")) / 100 if text.endswith("%") else float(text)
