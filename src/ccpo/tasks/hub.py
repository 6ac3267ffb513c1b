"""Tasks from the Hugging Face hub, or from a folder that holds such a data set. Needs the extra ``data``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccpo.errors import UserError, nearest
from ccpo.tasks.base import ListTask, Verifier
from ccpo.tasks.files import OnBadRow, rows_of, task_of_rows
from ccpo.tasks.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A data set with a short name: where it is and which of its parts is meant where the user names none."""

    hub: str
    config: str | None = None
    split: str = "test"


KNOWN = {
    "math500": Known(hub="HuggingFaceH4/MATH-500"),
    "gsm8k": Known(hub="openai/gsm8k", config="main"),
    "amc23": Known(hub="math-ai/amc23"),
    "gaokao2023en": Known(hub="MARIO-Math-Reasoning/Gaokao2023-Math-En", split="train"),
    "minervamath": Known(hub="math-ai/minervamath"),
    "aime24": Known(hub="HuggingFaceH4/aime_2024", split="train"),
    "aime25": Known(hub="math-ai/aime25"),
    "medqa": Known(hub="GBaker/MedQA-USMLE-4-options"),
}


def load_hub(
    dataset: str,
    *,
    config: str | None = None,
    split: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    choices: str | None = None,
    id: str | None = None,
    verifier: Verifier | str = "auto",
    seconds: float = 5.0,
    on_bad_row: OnBadRow = "error",
    offset: int = 0,
    limit: int | None = None,
    name: str | None = None,
) -> ListTask:
    """The problems of a data set on the hub (``owner/name``), of one of the names in :data:`KNOWN`, or in a local
    folder.

    ``split`` defaults to the known set's own, else ``test``. Columns, verifier and broken rows as in
    :func:`ccpo.tasks.files.load_file`. Code that comes with a data set is never run. Raises UserError if
    ``datasets`` is not installed, or the data set, its config or split cannot be had.
    """
    by_hub = {known.hub.lower(): known for known in KNOWN.values()}
    known = KNOWN.get(_short(dataset)) or by_hub.get(dataset.lower()) or Known(hub=dataset)
    split = split or known.split
    table = _fetch(known.hub, config or known.config, split, dataset)
    return task_of_rows(
        _rows(table),
        where=f"{dataset} ({split})",
        name=name or Path(dataset).name,
        columns={"question": question, "answer": answer, "choices": choices, "id": id},
        verifier=verifier,
        seconds=seconds,
        on_bad_row=on_bad_row,
        split=None,
        offset=offset,
        limit=limit,
    )


def _short(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum())


def _fetch(hub: str, config: str | None, split: str, asked: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data sets from the hub need the package datasets; install it with: pip install 'ccpo[data]'"
        ) from None
    try:
        return datasets.load_dataset(hub, config, split=split)
    except (ConnectionError, FileNotFoundError, ValueError, RuntimeError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        near = nearest(_short(asked), KNOWN)
        raise UserError(
            f"the data set {asked!r} (config {config or 'default'}, split {split}) could not be loaded: {said}."
            f"{near} Check its name, config and split; without a network, save it as a file and use kind: file"
        ) from None


def _rows(table: Any) -> Iterator[Row]:
    return rows_of(dict(row) for row in table)
