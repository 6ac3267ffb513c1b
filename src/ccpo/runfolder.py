"""A run's folder: what is in it, and that nothing in it is lost or overwritten unasked.

``recipe.json`` the whole configuration · ``metrics.jsonl`` a line a step · ``episodes/`` every rollout · ``checkpoints/`` ·
``evaluations.jsonl`` · ``remotes.json`` what endpoints have cost · ``summary.json`` at the end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ccpo.errors import UserError


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; is {str(path.parent)!r} the folder of a run?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as JSON ({error})") from None


class RunFolder:
    """The paths of a run and its append-only logs. With ``writes`` off nothing is made, written or deleted: a rank that is not the first."""

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self.recipe = self.path / "recipe.json"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.episodes = self.path / "episodes"
        self.checkpoints = self.path / "checkpoints"
        self.summary = self.path / "summary.json"
        self.remotes = self.path / "remotes.json"
        self.failure = self.path / "failure"

    def create(self, *, overwrite: bool) -> None:
        """Make the folder. Raises UserError where it holds a run already, unless ``overwrite``, which deletes that run."""
        if not self.writes:
            return
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another run.dir")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not overwrite:
                raise UserError(
                    f"{self.path} exists and is not empty. Go on with it (ccpo train --resume {self.path}), choose another folder "
                    "(--set run.dir=PATH), or replace it (--set run.overwrite=true)"
                )
            if not self.recipe.is_file():
                raise UserError(
                    f"{self.path} holds files but no run (no recipe.json), so it is not deleted; choose another run.dir"
                )
            if self.path.is_symlink():
                raise UserError(
                    f"{self.path} is a link, so it is not deleted; set run.dir to the folder that it leads to"
                )
            shutil.rmtree(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the run folder {self.path}: {error.strerror}; choose another run.dir"
            ) from None

    def write(self, path: Path, data: Any) -> None:
        """Write JSON atomically."""
        if self.writes:
            write_json(path, data)

    def append(self, path: Path, record: Mapping[str, Any]) -> None:
        """Add a line to a log. A last line that a kill cut off makes room for it."""
        if not self.writes:
            return
        if _is_torn(path):
            self._rewrite(path, self.read_lines(path))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_lines(self, path: Path) -> list[dict[str, Any]]:
        """The records of a log; a last line cut off by a kill is left out. Raises UserError where it is no UTF-8."""
        if not path.exists():
            return []
        records = []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is damaged: it is no UTF-8 ({error})") from None
        for line in lines:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def evaluated(self, step: int) -> list[dict[str, Any]]:
        """The evaluations after ``step`` steps."""
        return [r for r in self.read_lines(self.evaluations) if r["step"] == step]

    def rewind(self, step: int) -> None:
        """Forget what was logged after ``step`` steps: a resumed run writes it again."""
        if not self.writes:
            return
        for path in (self.metrics, self.evaluations):
            if path.exists():
                self._rewrite(path, [r for r in self.read_lines(path) if r["step"] <= step])
        for file in self.episodes.glob("step-*.jsonl.gz"):
            if int(file.name[5:].split(".")[0]) > step:
                file.unlink()
        self.summary.unlink(missing_ok=True)

    def _rewrite(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        os.replace(temporary, path)

    def episode_file(self, step: int) -> Path:
        return self.episodes / f"step-{step:06d}.jsonl.gz"


def _is_torn(path: Path) -> bool:
    """Whether a log does not end with the end of a line."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
