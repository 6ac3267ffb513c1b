"""Files of a run, read without trust: whatever is in them, the page is made, and what had to be left out is said.

A run's folder may be half written, damaged or made to do harm. A file is read only where it is a regular file inside the
folder; a line that is no JSON object is passed over; every value is checked before it is used.
"""

from __future__ import annotations

import gzip
import json
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

MAX_LINE = 64 * 2**20  # bytes of one line
MAX_BYTES = 1024 * 2**20  # bytes read of one file, after decompression
BROKEN = (OSError, EOFError, zlib.error)


class Notes:
    """Sentences about what was left out, each once, the first of them in full and the rest as a count."""

    def __init__(self, most: int = 30) -> None:
        self.most, self.found = most, {}

    def add(self, sentence: str) -> None:
        self.found[sentence] = self.found.get(sentence, 0) + 1

    def sentences(self) -> list[str]:
        shown = [s if n == 1 else f"{s} ({n} times)" for s, n in list(self.found.items())[: self.most]]
        more = len(self.found) - len(shown)
        return [*shown, f"and {more} more of the kind"] if more > 0 else shown


def regular_file(root: Path, path: Path, notes: Notes) -> bool:
    """Whether ``path`` is a regular file inside ``root``. Says so in ``notes`` where it is something else; not where it is absent."""
    try:
        real = path.resolve()
        mode = real.stat().st_mode
    except FileNotFoundError:
        return False
    except (OSError, RuntimeError) as error:
        notes.add(f"{path.name} cannot be read ({type(error).__name__}); it is left out.")
        return False
    if not real.is_relative_to(root.resolve()):
        notes.add(f"{path.name} is a link that leads out of the run's folder; it is left out.")
        return False
    if not stat.S_ISREG(mode):
        notes.add(f"{path.name} is no regular file; it is left out.")
        return False
    return True


def parse(line: bytes | str) -> Any:
    """JSON, with null for NaN and infinity. Raises ValueError for anything that is no JSON, be it ever so deep."""
    try:
        return json.loads(line, parse_constant=lambda name: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(root: Path, path: Path, notes: Notes) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none."""
    if not regular_file(root, path, notes):
        return {}
    try:
        with path.open("rb") as file:
            data = parse(file.read(MAX_LINE))
    except (OSError, ValueError):
        notes.add(f"{path.name} is not readable as JSON; it is left out.")
        return {}
    if not isinstance(data, dict):
        notes.add(f"{path.name} holds no JSON object; it is left out.")
        return {}
    return data


def read_records(root: Path, path: Path, notes: Notes) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, each with an integer ``step``. A last line that is still being written is no mistake."""
    if not regular_file(root, path, notes):
        return []
    records, bad = [], 0
    for line, whole in lines(path, open, notes):
        try:
            record = parse(line)
        except ValueError:
            bad += whole
            continue
        if isinstance(record, dict) and integer(record.get("step")) is not None:
            records.append(record)
        else:
            bad += 1
    if bad:
        notes.add(f"{path.name}: {bad} line{'s are' if bad > 1 else ' is'} damaged and left out.")
    return records


def lines(path: Path, open_file: Callable[..., IO[bytes]], notes: Notes) -> Iterator[tuple[bytes, bool]]:
    """The lines of a file and whether each ends with the end of a line. Ends early, and says so, where the file cannot be opened
    or decompressed, and where a line or all of it is too long."""
    read = 0
    try:
        with open_file(path, "rb") as file:
            while line := file.readline(MAX_LINE + 1):
                read += len(line)
                if len(line) > MAX_LINE or read > MAX_BYTES:
                    notes.add(f"{path.name} is too long; the rest is left out.")
                    return
                if line.strip():
                    yield line, line.endswith(b"\n")
    except BROKEN:
        notes.add(f"{path.name} is damaged or cut off; what follows is left out.")


def gzip_lines(path: Path, notes: Notes) -> Iterator[bytes]:
    """The lines of a gzip-compressed file, as far as it can be read."""
    for line, _ in lines(path, gzip.open, notes):
        yield line


def number(value: Any) -> float | None:
    """A number of at most 1e100 either way, whose squares and sums are finite; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e100:
        return None
    return float(value)


def integer(value: Any) -> int | None:
    """A whole number that a double holds exactly; None for anything else."""
    return value if type(value) is int and abs(value) <= 2**53 else None


def text(value: Any, most: int = 200) -> str | None:
    """A text, cut to ``most`` characters; None for anything else."""
    return value[:most] if isinstance(value, str) else None


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def short(value: float | None, digits: int = 5) -> float | int | None:
    """A number in few characters: so many significant digits, without a fraction where there is none."""
    if value is None:
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded
