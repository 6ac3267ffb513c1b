"""What the figures share: colours, panels, legends, rows of methods.

Colours are Okabe and Ito's, which people with colour-blindness can tell apart; where there are more methods than colours, line styles
differ too. The headline pair has the two strongest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ccpo.compare.stats import Estimate
from ccpo.compare.summary import Entry, Summary
from ccpo.errors import UserError

STRONG = ("#0072B2", "#D55E00")
COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
STYLES = ("-", "--", "-.", ":")
WIDTH = 8.0
COLUMNS = 2
DPI = 110


def need_matplotlib() -> None:
    """Raises UserError where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'ccpo[plots]'") from None
    matplotlib.use("Agg")


def draw(makers: Mapping[str, Callable[[], Any]], folder: Path) -> dict[str, Path]:
    """Each figure as ``NAME.png`` in the folder, by name; a maker that returns None has nothing to show, and its earlier figure goes. Raises
    UserError where matplotlib is missing."""
    need_matplotlib()
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for name, make in makers.items():
            figure = make()
            path = folder / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)  # one of earlier results would be another's
                continue
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
            matplotlib.pyplot.close(figure)
            drawn[name] = path
    return drawn


def look(summary: Summary, method: str) -> dict[str, Any]:
    """Colour, line style and width of a method."""
    headline = summary.study.headline or []
    if method in headline:
        return {"color": STRONG[headline.index(method)], "linestyle": "-", "linewidth": 2.0}
    others = [m for m in summary.study.methods if m not in headline]
    place = others.index(method)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": STYLES[place // len(COLOURS) % len(STYLES)],
        "linewidth": 1.2,
    }


def panels(count: int, height: float, columns: int = COLUMNS) -> tuple[Any, list[Any]]:
    """A figure of ``count`` panels; places that are left over are hidden."""
    import matplotlib.pyplot as plt

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height * rows), layout="constrained", squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def legend_of(figure: Any, axes: Sequence[Any]) -> None:
    """One legend under all panels."""
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(4, len(found)), frameon=False)


def shown_methods(summary: Summary, task: str) -> list[tuple[str, Entry]]:
    return [(m, entry) for m in summary.study.methods if (entry := summary.entry(m, task)) is not None]


def error_bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    return [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]


def method_rows(axis: Any, summary: Summary, methods: Sequence[str], *, labels: bool) -> None:
    """Methods down the axis, the first on top."""
    axis.set_yticks(
        range(len(methods)), [summary.study.method_label(m) for m in methods] if labels else [""] * len(methods)
    )
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.25)


def empty_rows(axis: Any, methods: Sequence[str], known: Sequence[int]) -> None:
    for row in set(range(len(methods))) - set(known):
        axis.text(
            0.01, row, "no result", va="center", color="#999999", fontsize=8, transform=axis.get_yaxis_transform()
        )


def marker_legend(figure: Any, kinds: Sequence[tuple[str, str, str]], title: str | None = None) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            marker=marker,
            color="none",
            markerfacecolor=face,
            markeredgecolor="black",
            markersize=6,
            label=label,
        )
        for marker, face, label in kinds
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, title=title)
