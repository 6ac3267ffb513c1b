"""No false alarm in runs of shipped recipes that learn. Each base model is made once (a minute or two) and cached.

``CCPO_HEALTHY_RUNS=10`` makes 20 of them, ten of each recipe; without it there are two of each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import ccpo
from ccpo.alarms import find_alarms
from ccpo.runfolder import RunFolder

STEPS = 24
RUNS = int(os.environ.get("CCPO_HEALTHY_RUNS", "2"))
OVERRIDES = (
    f"trainer.steps={STEPS}",
    "trainer.eval_every=0",
    "trainer.save_every=0",
    "eval.problems=200",
    "log.tensorboard=false",
    "run.threads=1",
)


def raised(run: RunFolder) -> set[str]:
    """The alarms that held after any step."""
    return {
        key.removeprefix("alarm/") for line in run.read_lines(run.metrics) for key in line if key.startswith("alarm/")
    }


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["demo", "vote"])
@pytest.mark.parametrize("seed", range(RUNS))
def test_a_run_that_learns_raises_no_alarm(tmp_path: Path, recipe: str, seed: int):
    result = ccpo.train(recipe, [*OVERRIDES, f"run.seed={seed}", f"run.dir={tmp_path}/run"])
    assert result.summary["team_after"] > result.summary["team_before"] + 0.05  # healthy: it learns
    run = RunFolder(result.folder)
    assert [alarm for alarm in find_alarms(run) if alarm["level"] == "warn"] == []
    # under group baselines the demo's rule is shared reward, which the run says of itself
    told = raised(run) | {alarm["name"] for alarm in find_alarms(run)}
    assert told <= {"same_as_shared"}
    if told:
        for line in run.read_lines(run.metrics):
            assert {line[key] for key in line if key.endswith("/same_as_shared")} == {1.0}
