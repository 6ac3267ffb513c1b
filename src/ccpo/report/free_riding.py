"""What each agent contributes, as `ccpo diagnose free-riding` left it in a run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccpo.report.reading import Notes, integer, items, mapping, number, read_object, text
from ccpo.runfolder import RunFolder

FILE = "free_riding.json"
FIGURES = ("removal", "blank", "replay", "shapley")


def read_free_riding(folder: RunFolder, notes: Notes) -> dict[str, Any] | None:
    """``problems``, ``checkpoint``, ``data``; ``agents``: each with ``agent``, ``verdict`` and of each figure ``[mean, low, high]`` or None;
    ``untold``. None where nobody has measured it."""
    report = read_object(folder.path, folder.path / FILE, notes)
    agents = [
        {"agent": str(agent)[:64], "verdict": text(found.get("verdict"), 40) or ""}
        | {figure: _interval(mapping(found.get(figure))) for figure in FIGURES}
        for agent, found in ((a, mapping(f)) for a, f in mapping(report.get("agents")).items())
    ]
    if not agents:
        return None
    return {
        "problems": integer(report.get("problems")),
        "checkpoint": text(report.get("checkpoint"), 200),
        "data": text(report.get("data"), 200),
        "agents": agents,
        "untold": [t for line in items(report.get("untold")) if (t := text(line, 500))],
    }


def _interval(worth: Mapping[str, Any]) -> list[float] | None:
    values = [number(worth.get(key)) for key in ("mean", "low", "high")]
    return None if None in values else values  # type: ignore[return-value]
