"""What was measured, as tables in the terminal, a JSON file and a Markdown page."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ccpo import __version__
from ccpo.bench.figures import draw_all
from ccpo.bench.timing import Comparison
from ccpo.compare.extract import cpu_model
from ccpo.compare.markdown import number, table
from ccpo.errors import UserError

PARTS = {
    "decode": "Decoding",
    "update": "The update",
    "step": "A whole training step",
    "choices": "What each choice gives",
    "counterfactuals": "What counterfactuals cost",
    "credit": "Credit alone",
    "scaling": "How a step grows",
    "memory": "Peak memory",
}
WORDS = {
    "decode": "New tokens a second. *Of limit*: the share of the time in which the machine does the matrix products of the prompts and of the new "
    "tokens, and nothing else.",
    "update": "Tokens a second through one optimiser step, gradients clipped. The other side is a plain loop: padded rows through transformers in "
    "bfloat16 autocast, attention eager on a CPU and SDPA on a GPU, fused AdamW.",
    "step": "Seconds of a step from prompts to refreshed weights; same model, rollouts, tokens and reward on both sides.",
    "choices": "The same work with a choice of the decoder or the update and without it, 64 rows (`src/ccpo/bench/choices.py` says what each is). "
    "*Predicted*: the ratio of tokens, columns or passes, or of the matrix products alone, as if they were all; nothing is fitted.",
    "counterfactuals": "Seconds and generated tokens of a step beside the same step under shared reward.",
    "credit": "On one core. The loop is plain Python over lists, timed on a part and scaled up.",
    "scaling": "Seconds of a step while one number grows; the exponent is the slope of log time over log size, 1 being linear.",
    "memory": "MiB of a process that has made three steps, all imports included, and what it had before the model was loaded.",
}
KEPT = "<!-- below this line: written by hand, kept when the page is made again -->"


def machine(device: str) -> dict[str, Any]:
    """What ran it, on what."""
    found: dict[str, Any] = {
        "processor": cpu_model(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
    }
    found["ccpo"] = __version__
    for package in ("torch", "transformers", "trl", "comlrl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def show(comparison: Comparison, console: Console) -> None:
    """One line as soon as it is measured."""
    console.print("  " + "  ".join(cell for cell in row(comparison) if cell), highlight=False)


def columns(part: str) -> list[str]:
    return {
        "decode": ["", "ccpo", "best other", "ratio [quartiles]", "of limit"],
        "update": ["", "ccpo", "plain loop", "ratio [quartiles]", "of limit"],
        "step": ["", "ccpo", "other", "ratio [quartiles]"],
        "choices": ["", "with", "without", "predicted", "ratio [quartiles]"],
        "counterfactuals": ["", "rule", "shared reward", "seconds, ratio [quartiles]", "tokens, ratio"],
        "credit": ["", "ccpo", "loop", "ratio [quartiles]"],
        "scaling": ["", "seconds", "exponent"],
    }[part]


def row(found: Comparison) -> list[str]:
    """A comparison as the cells of its part's table."""
    medians = found.medians
    if found.part == "scaling":
        each = ", ".join(f"{value}: {seconds(s)}" for value, s in medians.items())
        return [found.name, each, f"{found.extra['exponent']:.2f}"]
    assert found.base is not None
    ours, base = medians[found.ours], medians[found.base]
    middle, low, high = found.ratios or (0.0, 0.0, 0.0)
    if found.part == "counterfactuals":
        ratio = f"{1 / middle:.2f} [{1 / high:.2f}, {1 / low:.2f}]"
        return [found.name, seconds(ours), seconds(base), ratio, f"{found.extra['tokens']:.2f}"]
    ratio = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    if found.part == "choices":
        return [found.name, seconds(ours), seconds(base), f"{found.extra['predicted']:.2f}", ratio]
    if found.part in ("step", "credit"):
        return [found.name, seconds(ours), f"{seconds(base)} ({found.base})", ratio]
    label = str(found.shape.get("generate", "")) or found.base
    limit = f"{found.extra['of_limit']:.0%}" if "of_limit" in found.extra else "–"
    rates = f"{number(found.work / ours)}/s", f"{number(found.work / base)}/s ({label})"
    return [found.name, *rates, ratio, limit]


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def summary(results: Mapping[str, Any], comparisons: Sequence[Comparison], console: Console) -> None:
    """All tables, at the end."""
    for part, title in PARTS.items():
        rows = [row(c) for c in comparisons if c.part == part]
        if rows:
            shown = Table(*columns(part), title=title, title_justify="left", box=None)
            for cells in rows:
                shown.add_row(*cells)
            console.print(shown)
    if results["memory"]:
        shown = Table("", "size", "peak", "before the model", title=PARTS["memory"], title_justify="left", box=None)
        for cells in _memory(results["memory"]):
            shown.add_row(*cells)
        console.print(shown)


def _memory(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [[r["side"], r["size"], f"{r['peak']:.0f}", f"{r['before']:.0f}"] for r in records]


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def refuse_other_page(path: Path) -> str:
    """What is written by hand at the end of an earlier page. Raises UserError for a file that is no such page."""
    if not path.exists():
        return "\n"
    _, mark, kept = path.read_text(encoding="utf-8").partition(KEPT)
    if not mark:
        raise UserError(f"{path} is there and was not written by ccpo bench; give --page another name, or remove it")
    return kept


def write_page(path: Path, results: Mapping[str, Any], comparisons: Sequence[Comparison]) -> None:
    """The page; what stands under the line ``KEPT`` stays."""
    kept = refuse_other_page(path)
    on = results["machine"]
    versions = ", ".join(f"{p} {on[p]}" for p in ("ccpo", "torch", "transformers", "trl", "comlrl") if p in on)
    command = f"ccpo bench{results['command']}"
    lines = [
        "# Benchmarks",
        f"Made by `{command}` on {on['processor']}, {on['threads']} threads, device {on['device']}, Python {on['python']}; {versions}. "
        f"It took {results['minutes']:.0f} minutes.",
        "Both sides of a comparison take turns in one process, so that a busy machine slows both alike. A ratio above 1 says that the "
        "other side takes so many times as long: the median over repeats, with quartiles. Before anything is timed, results are checked: "
        "log-probs against transformers, gradients against autograd, credit against a loop, tokens against what was asked for.",
    ]
    flag = "" if on["device"] == "cpu" else " --device cuda"
    for part, title in PARTS.items():
        rows = [row(c) for c in comparisons if c.part == part]
        if rows:
            head = columns(part)
            command_of = f"`ccpo bench {part}{flag}`"
            lines += [f"## {title}", f"{WORDS[part]} ({command_of})", table(head, rows, "l" + "r" * (len(head) - 1))]
    if results["memory"]:
        lines += [
            f"## {PARTS['memory']}",
            f"{WORDS['memory']} (`ccpo bench memory`)",
            table(["", "size", "peak", "before the model"], _memory(results["memory"]), "lrrr"),
        ]
    lines += [f"*Left out:* {note}" for note in results["notes"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_all(comparisons, path.with_suffix(""))
    lines += [f"![{name.replace('_', ' ')}]({file.relative_to(path.parent)})" for name, file in drawn.items()]
    path.write_text("\n\n".join(lines) + f"\n\n{KEPT}{kept}", encoding="utf-8")
