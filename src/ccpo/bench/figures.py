"""The figures of a benchmark: ratios with their quartiles, and how a step grows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ccpo.bench.timing import Comparison
from ccpo.compare.canvas import COLOURS, STRONG, WIDTH, draw, panels

PARTS = {
    "decode": "decoding, against generate",
    "update": "the update, against a plain loop",
    "step": "a whole step, against others",
    "choices": "a choice, against its absence",
}
BAR = 0.24  # inches a comparison


def draw_all(comparisons: Sequence[Comparison], folder: Path) -> dict[str, Path]:
    """Raises UserError where matplotlib is missing."""
    makers: dict[str, Any] = {f"ratios_{part}": partial(_ratios, comparisons, part) for part in PARTS}
    return draw(makers | {"scaling": partial(_scaling, comparisons)}, folder)


def _ratios(comparisons: Sequence[Comparison], part: str) -> Any:
    """How many times as long the other side takes; a diamond is what was predicted."""
    import matplotlib.pyplot as plt

    rows = [(c, c.ratios) for c in comparisons if c.part == part and c.ratios]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(WIDTH, 1.0 + BAR * len(rows)), layout="constrained")
    for place, (found, (middle, low, high)) in enumerate(rows):
        axis.plot([low, high], [place, place], color=STRONG[0], linewidth=2)
        axis.plot(middle, place, "o", color=STRONG[0], markersize=5)
        if "predicted" in found.extra:
            axis.plot(found.extra["predicted"], place, "D", color=STRONG[1], markersize=4, fillstyle="none")
    axis.axvline(1, color="0.6", linewidth=1)
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), [c.name + (f" ({c.base})" if part == "step" else "") for c, _ in rows])
    axis.invert_yaxis()
    axis.set_xlabel("times as fast (median and quartiles" + (", diamond: predicted)" if part == "choices" else ")"))
    axis.set_title(PARTS[part], loc="left")
    ticks = [t for t in (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50) if _within(t, rows)]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    return figure


def _within(tick: float, rows: Sequence[tuple[Comparison, tuple[float, float, float]]]) -> bool:
    shown = [1.0, *(r for _, ratios in rows for r in ratios), *(c.extra.get("predicted", 1.0) for c, _ in rows)]
    return 0.9 * min(shown) <= tick <= 1.1 * max(shown)


def _scaling(comparisons: Sequence[Comparison]) -> Any:
    """Step time over one number at a time, both beside their smallest."""
    lines = [c for c in comparisons if c.part == "scaling"]
    if not lines:
        return None
    figure, (axis,) = panels(1, 3.2)
    largest = 1.0
    for number, found in enumerate(lines):
        sizes, medians = [float(v) for v in found.shape["values"]], list(found.medians.values())
        largest = max(largest, sizes[-1] / sizes[0])
        label = f"{found.name.removeprefix('step time by ')}: exponent {found.extra['exponent']:.2f}"
        grown = [s / medians[0] for s in medians]
        axis.plot([s / sizes[0] for s in sizes], grown, "o-", color=(*STRONG, *COLOURS)[number], label=label)
    axis.plot([1, largest], [1, largest], ":", color="0.6", label="linear")
    axis.set(xscale="log", yscale="log", xlabel="times the smallest", ylabel="times its seconds")
    axis.legend(frameon=False)
    return figure
