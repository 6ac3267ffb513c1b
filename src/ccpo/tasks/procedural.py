"""Small tasks that tiny models can learn on a CPU, each with a teacher from which a base model is bootstrapped.

A problem is a pure function of (seed, split, index). Train and test never share a problem: a text belongs to the test
split when its CRC-32 is 0 modulo 10. A *teacher* says what a turn would say: right, or wrong with probability ``noise``
in the way that a careless agent is wrong (an error that is carried on, another letter).

``misled`` makes the teacher wrong in another way: about a fixed share of the facts that a task rests on (that 7 after 5 makes 2), each of them
wrong with probability ``noise`` whenever it is needed, and always in the same way. A model taught so holds false beliefs, one beside the
other: reinforcement learning must find out which, where careless slips are cured by being surer of everything at once.
"""

from __future__ import annotations

import random
import re
import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from ccpo.errors import UserError
from ccpo.tasks.verifiers import choice_verdict, exact_verdict
from ccpo.types import Problem, Verdict, VerdictStatus

Heard = Mapping[str, str | None]
"""The messages a turn reads, by turn name; None where the speaker was removed."""


@dataclass(frozen=True, kw_only=True)
class ProceduralTask:
    """Problems made from a seed. ``size`` problems; ``split`` train or test; ``seed`` chooses another stream; ``misled`` is the share of
    facts that a teacher with ``noise`` is wrong about (0: slips are random)."""

    size: int = 100_000
    split: Literal["train", "test"] = "train"
    seed: int = 0
    misled: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"task.size is {self.size}; a task needs at least one problem")
        if not 0 <= self.misled <= 1:
            raise UserError(f"task.misled is {self.misled}; it is a share of facts, from 0 to 1")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self.size:
            raise IndexError(index)
        for attempt in range(1000):
            rng = random.Random(f"{self.name}/{self.seed}/{self.split}/{index}/{attempt}")
            problem = self.make(rng, f"{self.name}-{self.split}-{self.seed}-{index}")
            if (zlib.crc32(problem.text.encode()) % 10 == 0) == (self.split == "test"):
                return problem
        raise UserError(f"{self.name}: the {self.split} split has no problem of this form; make the problems longer")

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def alphabet(self) -> str:
        """Every character that its problems and its teacher can write."""

    @abstractmethod
    def make(self, rng: random.Random, identity: str) -> Problem: ...

    @abstractmethod
    def teach(self, problem: Problem, turn: str, heard: Heard, rng: random.Random, noise: float) -> str:
        """What ``turn`` says of ``problem`` after it heard ``heard``; wrong with probability ``noise``."""

    def verify(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        return [exact_verdict(problem, text) for problem, text in pairs]

    def believes(self, fact: str, right: int, values: int, rng: random.Random, noise: float) -> int:
        """What a misled teacher takes a fact of ``values`` possible ones to be: mostly wrong where it is misled, always alike."""
        draw = random.Random(f"belief/{self.name}/{fact}")
        if draw.random() >= self.misled or rng.random() >= noise:
            return right
        return (right + draw.randrange(1, values)) % values

    def work_out(self, numbers: Sequence[int], rng: random.Random, noise: float, start: int = 0) -> str:
        """The scratchpad of a running sum modulo 10, by a teacher that slips or that is misled."""
        if not self.misled:
            return scratchpad(numbers, rng, noise, start)
        steps, total = [], start
        for number in numbers:
            total = self.believes(f"{total}+{number}", (total + number) % 10, 10, rng, noise)
            steps.append(f"{number}{total}")
        return " ".join(steps)


@dataclass(frozen=True, kw_only=True)
class DigitSum(ProceduralTask):
    """The last digit of a sum of digits, ``3+7+1+4`` → 5. The thinker writes each digit with the running sum so far,
    ``33 70 11 45``; the solver reads the last.

    ``graded``: the answer is every running sum (``3015``), paid the share of its digits that are right.

    A transformer of a million parameters learns it with that scratchpad and fails without: the thought is needed.
    """

    digits: tuple[int, int] = (3, 9)
    graded: bool = False
    name = "digit_sum"
    alphabet = "0123456789+ ="

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_digits(self.digits)

    def make(self, rng: random.Random, identity: str) -> Problem:
        low, high = self.digits
        numbers = [rng.randrange(10) for _ in range(rng.randint(low, high))]
        sums = "".join(str(total % 10) for total in accumulate(numbers))
        answer = sums if self.graded else sums[-1]
        return Problem(id=identity, text="+".join(map(str, numbers)), answer=answer, source=self.name)

    def teach(self, problem: Problem, turn: str, heard: Heard, rng: random.Random, noise: float) -> str:
        numbers = [int(d) for d in problem.text.split("+")]
        if turn == "single":  # one agent that does both: its scratchpad, then the answer
            worked = self.work_out(numbers, rng, noise)
            return f"{worked}={self._read_off(worked, rng, noise)}"
        if turn != "solver":
            return self.work_out(numbers, rng, noise)
        thought = heard.get("thinker")
        return self._read_off(thought, rng, noise) if thought else problem.answer

    def process(self, triples: Sequence[tuple[Problem, str, str]]) -> list[float | None]:
        """For the thinker's scratchpad, the share of its steps that are right; other turns are not judged."""
        return [_right_steps(problem, text) if turn == "thinker" else None for problem, turn, text in triples]

    def _read_off(self, thought: str, rng: random.Random, noise: float) -> str:
        """The answer as a thought has it."""
        said = "".join(step[-1] for step in thought.split()) if self.graded else thought[-1]
        if not self.misled:
            return said
        return "".join(str(self.believes(f"reads {digit}", int(digit), 10, rng, noise)) for digit in said)

    def verify(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """What stands behind the last ``=``; graded: the share of right digits, none where the answer is longer than it should be."""
        said = [(problem, text.rpartition("=")[2].strip()) for problem, text in pairs]
        if not self.graded:
            return [exact_verdict(problem, text) for problem, text in said]
        return [_graded(problem.answer, text) for problem, text in said]


def _right_steps(problem: Problem, text: str) -> float:
    numbers = [int(d) for d in problem.text.split("+")]
    right = [f"{number}{total % 10}" for number, total in zip(numbers, accumulate(numbers), strict=True)]
    return sum(a == b for a, b in zip(right, text.split(), strict=False)) / len(right)


def _graded(answer: str, text: str) -> Verdict:
    if not text:
        return Verdict(score=0.0, answer=None, status=VerdictStatus.NO_ANSWER)
    right = sum(a == b for a, b in zip(answer, text, strict=False))
    return Verdict(score=right / len(answer) if len(text) <= len(answer) else 0.0, answer=text)


def scratchpad(numbers: Sequence[int], rng: random.Random, noise: float, start: int = 0) -> str:
    """Each number beside the sum so far, modulo 10; with probability ``noise`` one addition is wrong and the error is
    carried on."""
    slip = rng.randrange(len(numbers)) if rng.random() < noise else -1
    steps, total = [], start
    for i, number in enumerate(numbers):
        total += number + (rng.randrange(1, 10) if i == slip else 0)
        steps.append(f"{number}{total % 10}")
    return " ".join(steps)


@dataclass(frozen=True, kw_only=True)
class TruthChoice(ProceduralTask):
    """Multiple choice: which of the statements is true? ``A T&F B F|T&T C F^F D T&F`` → B. Exactly one is.

    A statement joins ``literals`` truth values with and, or, exclusive or, read from left to right.
    """

    options: int = 4
    literals: int = 3
    name = "truth_choice"
    alphabet = "ABCDEFGHTF&|^ "

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (2 <= self.options <= 8 and self.literals >= 1):
            raise UserError(
                f"task.options is {self.options} and task.literals {self.literals}; the truth choice has 2 to 8 options "
                "of 1 literal or more"
            )

    def make(self, rng: random.Random, identity: str) -> Problem:
        letters = "ABCDEFGH"[: self.options]
        answer = rng.choice(letters)
        statements = {letter: self._statement(rng, letter == answer) for letter in letters}
        text = " ".join(f"{letter} {statement}" for letter, statement in statements.items())
        return Problem(id=identity, text=text, answer=answer, source=self.name, meta={"choices": statements})

    def _statement(self, rng: random.Random, truth: bool) -> str:
        while True:
            values = [rng.random() < 0.5 for _ in range(self.literals)]
            operators = [rng.choice("&|^") for _ in values[1:]]
            result, text = values[0], "FT"[values[0]]
            for operator, value in zip(operators, values[1:], strict=True):
                result = {"&": result and value, "|": result or value, "^": result != value}[operator]
                text += operator + "FT"[value]
            if result == truth:
                return text

    def teach(self, problem: Problem, turn: str, heard: Heard, rng: random.Random, noise: float) -> str:
        statements = problem.meta["choices"]
        if not self.misled:
            return problem.answer if rng.random() >= noise else rng.choice(sorted(statements))
        believed = [
            letter
            for letter, statement in sorted(statements.items())
            if self.believes(statement, int(letter == problem.answer), 2, rng, noise)
        ]
        return rng.choice(believed or sorted(statements))

    def verify(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        return [choice_verdict(problem, text) for problem, text in pairs]


@dataclass(frozen=True, kw_only=True)
class ChainSum(ProceduralTask):
    """The last digit of a sum whose digits come in ``parts`` parts, ``31|59|26`` → 6: one agent a part.

    In a chain of as many agents as parts, agent i writes the running sums of its part from the total that agent i-1
    handed on; with nothing handed on it begins at the first part. With a manager, the plan copies the parts, worker i
    sums part i as the plan has it, and the manager adds what the workers say and sums the parts of which it heard
    nothing. In any other team each turn sums it all.
    """

    parts: int = 3
    digits: tuple[int, int] = (1, 3)
    name = "chain_sum"
    alphabet = "0123456789| "

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_digits(self.digits)
        if self.parts < 1:
            raise UserError(f"task.parts is {self.parts}; a chain sum has at least one part")

    def make(self, rng: random.Random, identity: str) -> Problem:
        low, high = self.digits
        parts = [[rng.randrange(10) for _ in range(rng.randint(low, high))] for _ in range(self.parts)]
        text = "|".join("".join(map(str, part)) for part in parts)
        return Problem(id=identity, text=text, answer=str(sum(map(sum, parts)) % 10), source=self.name)

    def teach(self, problem: Problem, turn: str, heard: Heard, rng: random.Random, noise: float) -> str:
        parts = [[int(d) for d in part] for part in problem.text.split("|")]
        if turn == "plan":
            return _copied(parts, rng, noise)
        if turn == "final":
            said = [_last_digit(heard.get(f"worker{i}")) for i in range(1, len(parts) + 1)]
            return self.work_out(_flat([p if s is None else [s] for p, s in zip(parts, said, strict=True)]), rng, noise)
        speaker = re.fullmatch(r"(agent|worker)(\d+)", turn)
        if speaker is None:
            return self.work_out(_flat(parts), rng, noise)
        index = int(speaker[2]) - 1
        own = parts[index] if index < len(parts) else [0]  # more agents than parts: nothing is left to add
        if speaker[1] == "worker":
            planned = (heard.get("plan") or "").split()[index : index + 1]
            return self.work_out([int(d) for d in planned[0]] if planned else own, rng, noise)
        handed_on = next((_last_digit(text) for text in reversed([*heard.values()]) if text), None)
        if handed_on is None:
            return self.work_out(_flat(parts[: index + 1]), rng, noise)
        return self.work_out(own, rng, noise, handed_on)

    def verify(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """The answer is the last running sum: the last character, whoever spoke last."""
        return [exact_verdict(problem, text, "last_character") for problem, text in pairs]


def _copied(parts: Sequence[Sequence[int]], rng: random.Random, noise: float) -> str:
    """The parts as a plan shows them; with probability ``noise`` one digit is another."""
    digits = [list(part) for part in parts]
    if rng.random() < noise:
        part = rng.choice(digits)
        at = rng.randrange(len(part))
        part[at] = (part[at] + rng.randrange(1, 10)) % 10
    return " ".join("".join(map(str, part)) for part in digits)


def _last_digit(text: str | None) -> int | None:
    return int(text[-1]) if text and text[-1] in "0123456789" else None


def _flat(parts: Sequence[Sequence[int]]) -> list[int]:
    return [digit for part in parts for digit in part]


def _check_digits(digits: tuple[int, int]) -> None:
    low, high = digits
    if not 1 <= low <= high:
        raise UserError(f"task.digits is [{low}, {high}]; write the fewest and the most digits, at least 1: [3, 9]")


PROCEDURAL = {"digit_sum": DigitSum, "truth_choice": TruthChoice, "chain_sum": ChainSum}
