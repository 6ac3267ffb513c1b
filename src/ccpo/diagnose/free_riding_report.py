"""The free-riding report on a terminal: one table that fits 80 columns, and in words what it cannot tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

COLUMNS = ("removal", "blank", "replay", "shapley")
STYLES = {"free-rides": "yellow", "hurts": "yellow", "helps": "green"}
LEGEND = (
    "Points of reward with 95% intervals over problems. removal: what the team loses without the agent; blank: with its messages empty; "
    "replay: how far the reward moves with what it says (standard deviation); Shapley: what it adds to the parts of the team; needs: problems "
    "for an interval of ±{half_width:g} on its removal."
)


def free_riding_table(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a report of ``docs/free-riding.md``."""
    console = console or Console()
    console.print(
        _shown(
            f"{report['source']}: {report['problems']} problems × {report['samples']:g} rollouts; team {_number(report['team'])}"
        ),
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("agent", overflow="fold", min_width=6)
    for column in COLUMNS:
        table.add_column(column.replace("shapley", "Shapley"), justify="right", no_wrap=True)
    table.add_column("needs", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for agent, found in report["agents"].items():
        needs = found["removal"] or found["blank"]
        word = found["verdict"]
        table.add_row(
            _shown(agent),
            *(_number(found[column]) for column in COLUMNS),
            f"{needs['needed']:,}" if needs else "–",
            word,
            style=STYLES.get(word),
        )
    console.print(table)
    console.print(LEGEND.format(half_width=report["half_width"]), style="dim", highlight=False)
    for line in report["untold"]:
        console.print(_shown(f"Not told: {line}."), highlight=False)


def _shown(text: str) -> str:
    """Text of a log, which anybody may have written, without what could drive the terminal."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _number(worth: Mapping[str, float] | None) -> str:
    if worth is None:
        return "–"
    return f"{worth['mean']:.2f} ± {(worth['high'] - worth['low']) / 2:.2f}"
