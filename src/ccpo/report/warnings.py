"""The alarms of a run, for the page. This is the one place where the report asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccpo.report.reading import Notes, mapping, text
from ccpo.runfolder import RunFolder


def find_warnings(folder: RunFolder, notes: Notes) -> list[dict[str, str]]:
    """Each with ``level`` ("warn" or "info"), ``title``, ``what`` it means and what to ``try``. Empty where nothing is found."""
    from ccpo.alarms import find_alarms

    try:
        found = [_plain(mapping(alarm)) for alarm in find_alarms(folder.path)]
    except Exception as error:  # a damaged run may trip an alarm in any way; the page says so and shows the rest
        notes.add(f"The alarms could not be computed ({type(error).__name__}).")
        return []
    return [alarm for alarm in found if alarm["title"]]


def _plain(alarm: Mapping[str, Any]) -> dict[str, str]:
    level = "warn" if alarm.get("level") == "warn" else "info"
    return {"level": level} | {key: text(alarm.get(key), 2000) or "" for key in ("title", "what", "try")}
