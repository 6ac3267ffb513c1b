"""A folder's manifest: which files it holds, how long they are and their SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
_READ = 1 << 22


def write_manifest(folder: Path, step: int) -> None:
    """List every file under ``folder``; links are not followed (what they lead to is listed itself)."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(_files(folder))
    }
    text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest. Raises ValueError where it is not one of this format."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    if type(manifest.get("step")) is not int or not isinstance(manifest.get("files"), dict):
        raise ValueError("it does not list a step and files")
    return manifest


def verify(folder: Path) -> str | None:
    """What is wrong with the folder, in words; None where every file is as the manifest says and there is no other."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is not readable ({error})"
    present = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST}
    for name in sorted(present ^ set(manifest["files"])):
        return f"{name} is {'not listed in ' + MANIFEST if name in present else 'missing'}"
    for name, entry in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size
        if not isinstance(entry, dict) or size != entry.get("bytes"):
            return f"{name} has {size} bytes, not those of {MANIFEST}"
        if _digest(path) != entry.get("sha256"):
            return f"{name} does not match its checksum"
    return None


def flush(folder: Path, *, recursive: bool = True) -> None:
    """Make files and folders durable: a rename is only as safe as what was renamed."""
    if recursive:
        for path in _files(folder):
            _sync(path)
        for path in [p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()]:
            _sync(path)
    _sync(folder)


def _files(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder):  # does not enter linked folders
        found += [Path(root) / name for name in names]
        folders.sort()
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ):
            digest.update(block)
    return digest.hexdigest()
