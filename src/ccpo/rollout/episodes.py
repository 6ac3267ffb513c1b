"""Episodes on disk: one gzip-compressed JSONL file a step, one line a problem, in a versioned schema (``docs/episodes.md``)."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ccpo.errors import UserError
from ccpo.types import Completion, Counterfactual, FinishReason, Group, Problem, Rating, Rollout, Turn

SCHEMA = "ccpo.episodes/1"

PerAgent = Mapping[str, Sequence[Sequence[float]]]
"""Values by agent, then problem, then rollout."""


def write_episodes(
    path: Path, step: int, groups: Sequence[Group], credit: PerAgent, advantage: PerAgent, *, tokens: bool = True
) -> None:
    """Write one step's groups atomically. ``tokens=False`` leaves token ids and log-probs out."""
    lines = [json.dumps({"schema": SCHEMA, "step": step, "problems": len(groups)})]
    for p, group in enumerate(groups):
        rollouts = [
            {
                "n": n,
                "reward": rollout.reward,
                "answer": rollout.answer,
                "scores": dict(rollout.scores),
                "answers": dict(rollout.answers),
                "credit": {agent: _number(values[p][n]) for agent, values in credit.items()},
                "advantage": {agent: _number(values[p][n]) for agent, values in advantage.items()},
                "turns": [_turn(t, tokens) for t in rollout.turns],
                **({"ratings": _ratings(rollout.ratings, tokens)} if rollout.ratings else {}),
            }
            for n, rollout in enumerate(group.rollouts)
        ]
        counterfactuals = [
            {
                "removed": list(c.removed),
                "rollout": c.rollout,
                "draw": c.draw,
                "reward": c.reward,
                "answer": c.answer,
                "cached": c.cached,
                "turns": [_turn(t, tokens) for t in c.turns],
            }
            for c in group.counterfactuals
        ]
        problem = group.problem
        lines.append(
            json.dumps(
                {
                    "step": step,
                    "problem": {
                        "id": problem.id,
                        "text": problem.text,
                        "answer": problem.answer,
                        "source": problem.source,
                        "meta": dict(problem.meta),
                    },
                    "rollouts": rollouts,
                    "counterfactuals": counterfactuals,
                }
            )
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=5, mtime=0) as file:
        file.write(("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)


def read_episodes(path: Path, *, most: int | None = None) -> Iterator[tuple[Group, dict[str, Any]]]:
    """The groups of one file, each with the raw record it came from. Raises UserError on another schema, on a file that is
    damaged, with the line, and on one of more than ``most`` characters after decompression, before it reads on."""
    number = 1
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = _lines(file, path, most)
            header = json.loads(next(lines, "{}"))
            schema = header.get("schema") if isinstance(header, dict) else None
            if schema != SCHEMA:
                raise UserError(f"{path}: schema {schema!r}; this version reads {SCHEMA!r}")
            for line in lines:
                number += 1
                record = json.loads(line)
                yield _read_group(record), record
            if number - 1 != header["problems"]:
                raise UserError(
                    f"{path}: {header['problems']} problems were written, {number - 1} are there; it was cut off"
                )
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}, line {number}: not an episode file, or damaged ({type(error).__name__}: {error})"
        ) from None


def _lines(file: TextIO, path: Path, most: int | None) -> Iterator[str]:
    if most is None:
        yield from file
        return
    while line := file.readline(most + 1):
        most -= len(line)
        if most < 0:
            raise UserError(f"{path} is too long to be held in memory")
        yield line


def _read_group(record: Mapping[str, Any]) -> Group:
    return Group(
        problem=Problem(**record["problem"]),
        rollouts=tuple(
            Rollout(
                turns=tuple(_read_turn(t) for t in r["turns"]),
                answer=r["answer"],
                reward=r["reward"],
                scores=r["scores"],
                answers=r.get("answers", {}),
                ratings={agent: _read_rating(rating) for agent, rating in r.get("ratings", {}).items()},
            )
            for r in record["rollouts"]
        ),
        counterfactuals=tuple(
            Counterfactual(
                removed=tuple(c["removed"]),
                rollout=c["rollout"],
                draw=c["draw"],
                turns=tuple(_read_turn(t) for t in c["turns"]),
                answer=c["answer"],
                reward=c["reward"],
                cached=c["cached"],
            )
            for c in record["counterfactuals"]
        ),
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _turn(turn: Turn, tokens: bool) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": turn.name,
        "agent": turn.agent,
        "policy": turn.policy,
        "prompt": turn.prompt,
        "text": turn.completion.text,
        "message": turn.message,
        "finish": str(turn.completion.finish),
        "cut_tokens": turn.cut_tokens,
        "temperature": turn.temperature,
    }
    if tokens:
        record["prompt_ids"] = list(turn.prompt_ids)
        record["token_ids"] = list(turn.completion.token_ids)
        record["logprobs"] = [round(x, 6) for x in turn.completion.logprobs]
    if turn.completion.counted is not None:
        record["counted_tokens"] = turn.completion.counted
    return record


def _ratings(ratings: Mapping[str, Rating], tokens: bool) -> dict[str, Any]:
    return {
        agent: {"shares": list(r.shares), "valid": r.valid, "turn": None if r.turn is None else _turn(r.turn, tokens)}
        for agent, r in ratings.items()
    }


def _read_rating(record: Mapping[str, Any]) -> Rating:
    turn = record["turn"]
    return Rating(
        shares=tuple(record["shares"]), valid=record["valid"], turn=None if turn is None else _read_turn(turn)
    )


def _read_turn(record: Mapping[str, Any]) -> Turn:
    return Turn(
        name=record["name"],
        agent=record["agent"],
        policy=record["policy"],
        prompt=record["prompt"],
        prompt_ids=tuple(record.get("prompt_ids", ())),
        completion=Completion(
            token_ids=tuple(record.get("token_ids", ())),
            logprobs=tuple(record.get("logprobs", ())),
            text=record["text"],
            finish=FinishReason(record["finish"]),
            counted=record.get("counted_tokens"),
        ),
        message=record["message"],
        cut_tokens=record["cut_tokens"],
        temperature=record["temperature"],
    )
