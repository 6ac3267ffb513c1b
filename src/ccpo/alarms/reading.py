"""What the alarms read of a run, checked before it is used: a file that is there and is not what a run writes raises a UserError that
names the file, the line and the key. A last line that is still being written is no mistake."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ccpo.errors import UserError
from ccpo.explain import explain
from ccpo.runfolder import RunFolder

Step = Annotated[int, Field(ge=0, le=2**53)]


class Form(BaseModel):
    """A form whose values are not converted; what it does not name is passed over."""

    model_config = ConfigDict(strict=True)


Any_Form = TypeVar("Any_Form", bound=Form)


class TurnForm(Form):
    name: str
    agent: str
    prompt: str


class TeamForm(Form):
    """What :func:`ccpo.teams.describe` says."""

    agents: list[str]
    decider: str | None
    decision: str | None
    reads: list[str]
    turns: list[TurnForm]
    free: list[str]

    @model_validator(mode="after")
    def _reads_its_turns(self) -> TeamForm:
        unknown = set(self.reads) - {turn.name for turn in self.turns}
        if unknown:
            raise ValueError(f"the decision reads {min(unknown)[:80]!r}, which is none of the turns")
        return self


class RuleForm(Form):
    kind: str


class ConfigForm(Form):
    credit: RuleForm


class RecipeForm(Form):
    """``recipe.json``. Runs from before teams were described have no ``team``."""

    config: ConfigForm
    objects: dict[str, str] = {}
    team: TeamForm | None = None

    @property
    def rule(self) -> str:
        """The rule's kind, or the class of an object that was passed in."""
        given = self.objects.get("credit")
        return given.partition("(")[0] if given else self.config.credit.kind


class MetricsForm(Form):
    """A line of ``metrics.jsonl``: a step, and numbers."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None] = Field(init=False)

    step: Step


class IntervalForm(Form):
    mean: float
    low: float
    high: float


class ReportForm(Form):
    problems: Step
    team: IntervalForm
    without: dict[str, IntervalForm] = {}
    alone: dict[str, IntervalForm] = {}


class ExamForm(Form):
    """A line of ``evaluations.jsonl``."""

    step: Step
    reports: dict[str, ReportForm]


def read_recipe(run: RunFolder) -> RecipeForm | None:
    """The recipe; None where it is not there."""
    data = _bytes(run.recipe)
    if data is None:
        return None
    return _fitting(RecipeForm, _object(data, str(run.recipe)), str(run.recipe))


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    return [_fitting(MetricsForm, line, where).model_dump() for line, where in _records(run.metrics)]


def read_exams(run: RunFolder) -> list[dict[str, Any]]:
    """``step`` and ``report``, that of the first data set, of each evaluation that has one."""
    exams = [_fitting(ExamForm, line, where) for line, where in _records(run.evaluations)]
    return [{"step": e.step, "report": next(iter(e.reports.values())).model_dump()} for e in exams if e.reports]


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file of JSON lines, each with where it stands."""
    *lines, last = (_bytes(path) or b"").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _object(line, where), where
    where = f"{path}, line {len(lines) + 1}"
    if last.strip():
        try:
            record = _parsed(last)
        except ValueError:
            return
        yield _mapping(record, where), where


def _bytes(path: Path) -> bytes | None:
    """What is in a file; None where there is none."""
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise UserError(f"{path} is no regular file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = _parsed(data)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: it is no UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise UserError(f"{where}: not readable as JSON ({error})") from None
    return _mapping(found, where)


def _parsed(data: bytes) -> Any:
    """Raises ValueError for anything that is no JSON, be it ever so deep."""
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _mapping(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        kinds = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}
        raise UserError(f"{where}: {kinds.get(type(found), 'a number')} where a JSON object should be")
    return found


def _fitting(form: type[Any_Form], data: Mapping[str, Any], where: str) -> Any_Form:
    try:
        return form.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, form, where, data).partition("\n")[0]) from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
