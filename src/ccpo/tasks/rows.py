"""Reads rows from files as they are: parquet, JSON lines, JSON, CSV and the LogiQA text format. Nothing in them is
trusted.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccpo.errors import UserError, nearest

LONGEST_ROW = 8 << 20  # bytes; no question is that long, and a file without line ends must not fill the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row, or why it cannot be read. ``where`` is its place as a person finds it: ``line 7`` or ``row 7``,
    counted from 1.
    """

    where: str
    number: int
    fields: Mapping[str, Any] | None = None
    trouble: str = ""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file by its extension. Raises UserError where the file as a whole cannot be read."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it, or load a folder of a data set with kind: hub")
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"there is no file {path}." + nearest(path.name, beside))
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: a data file ends in {', '.join(READERS)}, not in {path.suffix or 'nothing'}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; it needs at least one row")
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _json_lines(path: Path) -> Iterator[Row]:
    number = 0
    with path.open("rb") as file:
        while line := file.readline(LONGEST_ROW):
            number += 1
            if not line.endswith(b"\n") and len(line) == LONGEST_ROW:
                while (rest := file.readline(LONGEST_ROW)) and not rest.endswith(b"\n"):
                    pass
                yield Row(where=f"line {number}", number=number, trouble=f"it is longer than {LONGEST_ROW >> 20} MB")
            elif line.strip(b" \t\r\n\xef\xbb\xbf"):
                yield _json_row(line, number)


def _json_row(line: bytes, number: int) -> Row:
    where = f"line {number}"
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Row(where=where, number=number, trouble=f"it is not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return Row(where=where, number=number, trouble=f"it is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Row(where=where, number=number, trouble=f"it is not JSON that can be read: {type(error).__name__}")
    return _object(value, where, number)


def _object(value: Any, where: str, number: int) -> Row:
    if not isinstance(value, dict):
        return Row(
            where=where, number=number, trouble=f"it is a {type(value).__name__}; a row is an object with named columns"
        )
    return Row(where=where, number=number, fields=value)


def _json(path: Path) -> Iterator[Row]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the name .json
            yield from _json_lines(path)
            return
        raise UserError(f"{path}, line {error.lineno}: it is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON that can be read: {type(error).__name__}") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise UserError(
                f"{path}: found an object with {len(lists)} lists; it must be a list of rows, "
                "or an object with one such list"
            )
        content = lists[0]
    if not isinstance(content, list):
        raise UserError(f"{path}: found a {type(content).__name__}; it must be a list of rows")
    for number, value in enumerate(content, start=1):
        yield _object(value, f"row {number}", number)


def _csv(path: Path) -> Iterator[Row]:
    before = csv.field_size_limit(LONGEST_ROW)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header: list[str] | None = None
            while True:
                try:
                    values = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Row(
                        where=f"line {reader.line_num}", number=reader.line_num, trouble=f"it is not CSV: {error}"
                    )
                    continue
                if not values:
                    continue
                if header is None:
                    header = [name.strip() for name in values]
                    continue
                yield _csv_row(header, values, reader.line_num)
    finally:
        csv.field_size_limit(before)


def _csv_row(header: list[str], values: list[str], line: int) -> Row:
    where = f"line {line}"
    if len(values) != len(header):
        return Row(where=where, number=line, trouble=f"it has {len(values)} fields and the header {len(header)}")
    return Row(where=where, number=line, fields=dict(zip(header, values, strict=True)))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=512):
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        (fields,) = batch.slice(i, 1).to_pylist()
                    except (UnicodeDecodeError, ValueError) as error:
                        yield Row(
                            where=f"row {number}",
                            number=number,
                            trouble=f"a value cannot be read: {type(error).__name__}",
                        )
                        continue
                    yield Row(where=f"row {number}", number=number, fields=fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file that can be read: {str(error).splitlines()[0][:200]}") from None


_OPTION_MARK = r"^\s*{}(?![A-Za-z])\s*[.．、:)]?\s*"


def _logiqa(path: Path) -> Iterator[Row]:
    """Blocks of seven lines between blank lines: the answer's letter, passage, question, four options."""
    block: list[str] = []
    start = 0
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_ROW):
            number += 1
            text = line.decode("utf-8-sig", "surrogateescape").strip()
            if text:
                start = start if block else number
                block.append(text)
            elif block:
                yield _logiqa_row(block, start)
                block = []
    if block:
        yield _logiqa_row(block, start)


def _logiqa_row(block: list[str], start: int) -> Row:
    where = f"line {start}"
    if len(block) != 7:
        trouble = (
            f"found {len(block)} lines up to the next blank line; LogiQA has 7: "
            "the answer's letter, passage, question, four options"
        )
        return Row(where=where, number=start, trouble=trouble)
    answer, passage, question, *options = block
    marks = [re.match(_OPTION_MARK.format(letter), option) for letter, option in zip("ABCD", options, strict=True)]
    if sum(mark is not None for mark in marks) >= 3:  # else the letters are part of the text ("A man ...")
        options = [option[mark.end() :] if mark else option for mark, option in zip(marks, options, strict=True)]
    return Row(
        where=where,
        number=start,
        fields={"question": f"{passage}\n{question}", "options": options, "answer": answer.upper()},
    )


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _logiqa,
}
