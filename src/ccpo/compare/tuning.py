"""Which grid point a method takes on a task: the one with the largest area under the learning curve over the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ccpo.compare.cells import Cell, Chosen, Point, tune_cells
from ccpo.compare.stats import area_under
from ccpo.compare.study import Study

Look = Callable[[Cell], Mapping[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A grid point with its score: the mean over tuning seeds of the normalised area under the curve; None where a cell failed."""

    point: Point
    score: float | None


def choose(
    study: Study, result: Look, failed: Callable[[Cell], bool]
) -> tuple[Chosen, dict[tuple[str, str], list[Tuned]]]:
    """The chosen point of each (method, task), None where cells are still missing, and all scores of those that are tuned.

    A point of which a cell failed is out; where all are out, the first is taken, so that the failure shows in the results. Of equal
    scores the first in the grid's order wins.
    """
    chosen: dict[tuple[str, str], Point | None] = {pair: {} for pair in study.applies()}
    scores: dict[tuple[str, str], list[Tuned]] = {}
    for pair, grid in tune_cells(study).items():
        budget = study.tasks[pair[1]].tokens
        found = [_score(point, cells, budget, result, failed) for point, cells in grid]
        if None in found:
            chosen[pair] = None
            continue
        scores[pair] = [tuned for tuned in found if tuned is not None]
        valid = [tuned for tuned in scores[pair] if tuned.score is not None]
        best = max(valid, key=lambda tuned: tuned.score, default=scores[pair][0])
        chosen[pair] = best.point
    return chosen, scores


def _score(
    point: Point, cells: Sequence[Cell], budget: int, result: Look, failed: Callable[[Cell], bool]
) -> Tuned | None:
    areas = []
    for cell in cells:
        found = result(cell)
        if found is not None:
            areas.append(area_under(found["curve"], budget))
        elif failed(cell):
            return Tuned(point=point, score=None)
        else:
            return None
    return Tuned(point=point, score=sum(areas) / len(areas))
