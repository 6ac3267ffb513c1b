"""The study file: which methods, on which tasks, with which seeds, at what budget. It is checked whole before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from ccpo.config import Section
from ccpo.errors import UserError, nearest
from ccpo.explain import explain
from ccpo.plain_yaml import read_mapping

Nested = dict[str, Any]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_+-]*$", max_length=40)]
Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]
"""Values by key of the recipe; several keys with a comma between them take the same value."""
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Seeds = Annotated[list[Seed], Field(min_length=1)]


def _seeds(value: Any) -> Any:
    """A count is short for 0, 1, …, count − 1."""
    return list(range(value)) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else value


class StudySection(Section):
    @field_validator("seeds", "headline_seeds", mode="before", check_fields=False)
    @classmethod
    def _count(cls, value: Any) -> Any:
        return _seeds(value)

    @field_validator("seeds", "headline_seeds", mode="after", check_fields=False)
    @classmethod
    def _no_seed_twice(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("duplicate cells: a seed is given twice")
        return value


class TaskSpec(StudySection):
    """A task of the study: what it adds to the base recipe, and the budget that every method gets on it."""

    recipe: Nested = Field({}, description="laid over the base recipe")
    tokens: int = Field(
        ge=1, description="budget of generated tokens of a cell: joint, counterfactual and rating turns together"
    )
    every: int | None = Field(None, ge=1, description="tokens between evaluations; default: a fiftieth of the budget")
    label: str | None = None
    ood: Nested | None = Field(
        None, description="what the out-of-distribution set changes of the task, or another task (kind)"
    )
    single: Nested = Field({}, description="laid over the recipe for methods of a single agent")
    grid: Grid | None = Field(None, description="a grid of its own in place of the study's, for methods without one")

    @property
    def interval(self) -> int:
        return self.every or max(1, self.tokens // 50)


class MethodSpec(StudySection):
    """A method: what it adds to the recipe of every task."""

    set: Nested = Field({}, description="laid over the task's recipe")
    by_task: dict[str, Nested] = Field({}, description="laid over `set` on the tasks named")
    label: str | None = None
    single: bool = Field(False, description="a single agent: takes the task's `single` section too")
    train: bool = Field(True, description="false: the team is judged as it is before training")
    tune: bool = Field(True, description="false: keeps the recipe's hyperparameters")
    grid: Grid | None = Field(None, description="a grid of its own in place of the study's")
    tasks: list[str] | None = Field(
        None, description="the tasks it applies to; default: all without a reason in why_empty"
    )
    why_empty: dict[str, str] = Field({}, description="for each task it does not apply to, the reason")


class ExamSpec(Section):
    """How a finished cell is judged, in distribution and out of it."""

    problems: int = Field(500, ge=1)
    samples: int = Field(1, ge=1)
    votes: int | None = Field(
        None, ge=1, description="samples of a single agent, for its majority vote; default: samples"
    )
    temperature: float = Field(1.0, ge=0)
    ablations: bool = Field(True, description="removing agents, one sample each")

    def of(self, *, single: bool) -> dict[str, Any]:
        """The exam of a team's cell, or of a single agent's."""
        found = self.model_dump(exclude={"votes"})
        return found | ({"samples": self.votes} if single and self.votes else {})


class TuneSpec(StudySection):
    """Every trained method × task tries each point of the grid; the best area under the learning curve is taken."""

    grid: Grid = Field(min_length=1)
    seeds: Seeds = Field([1000, 1001])


class SweepSpec(StudySection):
    """One key of one method on one task, everything else as tuned."""

    method: str
    task: str
    key: str
    values: Annotated[list[Any], Field(min_length=1)]
    seeds: Seeds = Field([0, 1, 2, 3, 4])
    label: str | None = None


class Study(StudySection):
    """A whole study."""

    name: Name
    title: str | None = None
    notes: str | None = Field(None, description="what its author has to say on top of the page, in Markdown")
    base: Nested = Field({})
    tasks: dict[Name, TaskSpec] = Field(min_length=1)
    methods: dict[Name, MethodSpec] = Field(min_length=1)
    seeds: Seeds
    headline: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    headline_seeds: Seeds | None = None
    reference: str | None = Field(
        None, description="the method whose final accuracy sets the 90% mark; default: headline[1]"
    )
    boxes: list[str] | None = Field(
        None, description="methods whose credit is drawn; default: the headline pair and two more"
    )
    exam: ExamSpec = ExamSpec()
    tune: TuneSpec | None = None
    sweeps: dict[Name, SweepSpec] = Field({})

    _drift: dict[str, Any] = PrivateAttr(default_factory=dict)

    def since(self, drift: Mapping[str, Any]) -> Study:
        """The study in a folder that was begun when those defaults of ``drift`` (see :mod:`ccpo.compare.drift`) were others."""
        copy = self.model_copy()
        copy._drift = dict(drift)
        return copy

    @property
    def drift(self) -> Mapping[str, Any]:
        return self._drift

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        for where, names in self._method_names().items():
            for name in names:
                if name not in self.methods:
                    raise ValueError(
                        f"{where}: unknown method {name!r}; the study has {', '.join(self.methods)}.{nearest(name, self.methods)}"
                    )
        for where, names in self._task_names().items():
            for name in names:
                if name not in self.tasks:
                    raise ValueError(
                        f"{where}: unknown task {name!r}; the study has {', '.join(self.tasks)}.{nearest(name, self.tasks)}"
                    )
        self._every_empty_cell_has_its_reason()
        if self.headline_seeds is not None and self.headline is None:
            raise ValueError(
                "headline_seeds is set but headline is not; name the two methods, for example headline: [auto, shared]"
            )
        if self.tune is not None:
            used = set(self.seeds) | set(self.headline_seeds or ()) | {s for w in self.sweeps.values() for s in w.seeds}
            shared = sorted(used & set(self.tune.seeds))
            if shared:
                raise ValueError(
                    f"tune.seeds: {shared} are seeds of the results too; tune with seeds that the results do not use"
                )
        for name, sweep in self.sweeps.items():
            if self.empty_reason(sweep.method, sweep.task) is not None:
                raise ValueError(
                    f"sweeps.{name}: the method {sweep.method!r} does not apply to the task {sweep.task!r}"
                )
            if not self.methods[sweep.method].train:
                raise ValueError(
                    f"sweeps.{name}: the method {sweep.method!r} is not trained, so there is nothing to sweep"
                )
        return self

    def _method_names(self) -> dict[str, list[str]]:
        found = {
            "headline": self.headline or [],
            "reference": [self.reference] if self.reference else [],
            "boxes": self.boxes or [],
        }
        return found | {f"sweeps.{name}.method": [sweep.method] for name, sweep in self.sweeps.items()}

    def _task_names(self) -> dict[str, list[str]]:
        found = {f"sweeps.{name}.task": [sweep.task] for name, sweep in self.sweeps.items()}
        for name, method in self.methods.items():
            found[f"methods.{name}.tasks"] = method.tasks or []
            found[f"methods.{name}.why_empty"] = list(method.why_empty)
            found[f"methods.{name}.by_task"] = list(method.by_task)
        return found

    def _every_empty_cell_has_its_reason(self) -> None:
        for name, method in self.methods.items():
            both = set(method.tasks or ()) & set(method.why_empty)
            if both:
                raise ValueError(
                    f"methods.{name}: {', '.join(sorted(both))} are in tasks and in why_empty; a cell is run or empty, not both"
                )
            for task in self.tasks:
                if method.tasks is not None and task not in method.tasks and task not in method.why_empty:
                    raise ValueError(
                        f"methods.{name}.why_empty.{task}: an empty cell states its reason; give one, or add the task to methods.{name}.tasks"
                    )

    def empty_reason(self, method: str, task: str) -> str | None:
        """Why a method has no cell on a task; None where it has."""
        return self.methods[method].why_empty.get(task)

    def applies(self) -> list[tuple[str, str]]:
        """Every (method, task) that has cells, tasks outermost."""
        return [(m, t) for t in self.tasks for m in self.methods if self.empty_reason(m, t) is None]

    def seeds_of(self, method: str) -> list[int]:
        if self.headline and self.headline_seeds and method in self.headline:
            return self.headline_seeds
        return self.seeds

    @property
    def yardstick(self) -> str | None:
        """The method whose final accuracy sets the mark that tokens are counted to."""
        return self.reference or (self.headline[1] if self.headline else None)

    def method_label(self, name: str) -> str:
        return self.methods[name].label or name.replace("_", " ")

    def task_label(self, name: str) -> str:
        return self.tasks[name].label or name.replace("_", " ")


def shipped_studies() -> dict[str, Path]:
    """The studies inside the package, by name."""
    return {p.stem: p for p in sorted((Path(__file__).parents[1] / "recipes" / "studies").glob("*.yaml"))}


def load_study(source: str | Path | Mapping[str, Any]) -> Study:
    """The :class:`Study` of a YAML file, of the name of a shipped one, or of a mapping. Raises
    :class:`~ccpo.errors.UserError` that names the key, what was found, what is allowed and the nearest right name."""
    if isinstance(source, Mapping):
        data, where = dict(source), "study"
    else:
        path = _find(source)
        data, where = read_mapping(path, "a study is a mapping (name, base, tasks, methods, seeds, …)"), path.name
    try:
        return Study.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, Study, where, data)) from None


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_studies()
    if str(source) in shipped:
        return shipped[str(source)]
    raise UserError(
        f"No study at {str(source)!r}: neither a file nor a shipped study ({', '.join(shipped)}).{nearest(path.stem, shipped)}"
    )
