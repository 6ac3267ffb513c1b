"""``ccpo bench``: which parts run, and where their results go."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ccpo.bench import choices, counterfactuals, decode, kernels, memory, report, scaling, step, update
from ccpo.bench.timing import Comparison
from ccpo.compare.canvas import need_matplotlib
from ccpo.errors import UserError, nearest

ON_GPU = ("decode", "update", "step")


def bench(
    parts: Sequence[str] = (),
    *,
    quick: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    repeats: int | None = None,
    out: Path | None = None,
    page: Path | None = None,
) -> dict[str, Any]:
    """Run the parts (default: all that the device has), print tables, write JSON and page where asked for; returns the results.

    Raises UserError for an unknown part or a device that is not there, RunFailure where a side computes something wrong.
    """
    chosen = _parts(parts, device)
    if page is not None:
        report.refuse_other_page(page)
        need_matplotlib()
    if threads is not None:
        torch.set_num_threads(threads)
    mode = "gpu" if device == "cuda" else "quick" if quick else "full"
    repeats = repeats or (3 if quick else 7)
    console, notes, started = Console(), [], time.monotonic()
    comparisons: list[Comparison] = []
    records: list[dict[str, object]] = []
    results: dict[str, Any] = {}
    for part in chosen:
        console.print(f"[bold]{report.PARTS[part]}[/bold]")
        if part == "memory":
            records = memory.run(mode)
        else:
            for found in _run(part, mode, repeats, device, notes):
                comparisons.append(found)
                report.show(found, console)
        # after each part, so that nothing is lost where a later one fails
        results = {
            "command": "".join(f" {p}" for p in parts) + " --quick" * quick + f" --device {device}" * (device != "cpu"),
            "machine": report.machine(device),
            "mode": mode,
            "repeats": repeats,
            "minutes": (time.monotonic() - started) / 60,
            "comparisons": [c.to_json() for c in comparisons],
            "memory": records,
            "notes": notes,
        }
        if out is not None:
            report.write_json(out, results)
        if page is not None:
            report.write_page(page, results, comparisons)
    report.summary(results, comparisons, console)
    for note in notes:
        console.print(f"left out: {note}")
    return results


def _parts(parts: Sequence[str], device: str) -> list[str]:
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device is cpu or cuda; found {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device is cuda, but torch sees no CUDA device here; leave it out, or install a CUDA build of torch"
        )
    known = [p for p in report.PARTS if device == "cpu" or p in ON_GPU]
    for part in parts:
        if part not in known:
            raise UserError(
                f"{part!r} is no part of the benchmarks on {device}; they are {', '.join(known)}.{nearest(part, known)}"
            )
    return [p for p in known if not parts or p in parts]


def _run(part: str, mode: str, repeats: int, device: str, notes: list[str]) -> Iterator[Comparison]:
    if part == "decode":
        return decode.run(mode, repeats=repeats, device=device)
    if part == "update":
        return update.run(mode, repeats=repeats, device=device)
    if part == "step":
        return step.run(mode, repeats=repeats, device=device, note=notes.append)
    if part == "choices":
        return choices.run(mode, repeats=repeats)
    if part == "counterfactuals":
        return counterfactuals.run(mode, repeats=repeats, device=device)
    if part == "credit":
        return kernels.run(mode, repeats=repeats)
    return scaling.run(mode, repeats=repeats, device=device)
