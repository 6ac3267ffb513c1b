"""The alarms of a run, for the page. This is the one place where the report asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ccpo.errors import UserError
from ccpo.report.reading import MAX_BYTES, Notes, mapping, regular_file, text
from ccpo.runfolder import RunFolder


def find_warnings(folder: RunFolder, notes: Notes) -> list[dict[str, str]]:
    """Each with ``level`` ("warn" or "info"), ``title``, ``what`` it means and what to ``try``. Empty where nothing is found."""
    from ccpo.alarms import find_alarms

    for path in (folder.recipe, folder.metrics, folder.evaluations):
        if _is_unfit(folder, path):
            notes.add(
                f"The alarms are not computed, because {path.name} is no regular file of this folder, or too long."
            )
            return []
    try:
        found = [_plain(mapping(alarm)) for alarm in find_alarms(folder.path, notes.add)]
    except UserError as error:
        notes.add(f"The alarms could not be computed: {str(error)[:500]}")
        return []
    except Exception as error:  # a damaged run may trip an alarm in any way; the page says so and shows the rest
        notes.add(f"The alarms could not be computed ({type(error).__name__}).")
        return []
    return [alarm for alarm in found if alarm["title"]]


def _is_unfit(folder: RunFolder, path: Path) -> bool:
    """Whether alarms, which read the whole of a file, must not be given it: a pipe or a device has no end."""
    if not path.exists():
        return False
    return not regular_file(folder.path, path, Notes()) or path.stat().st_size > MAX_BYTES


def _plain(alarm: Mapping[str, Any]) -> dict[str, str]:
    level = "warn" if alarm.get("level") == "warn" else "info"
    return {"level": level} | {key: text(alarm.get(key), 2000) or "" for key in ("title", "what", "try")}
