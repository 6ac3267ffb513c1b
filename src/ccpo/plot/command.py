"""``ccpo plot``: checks what is asked, reads the runs, draws, and writes one vector file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ccpo.compare.canvas import need_matplotlib
from ccpo.errors import UserError, nearest

KINDS = {
    "curves": "held-out accuracy and training reward over generated tokens",
    "credit": "what each agent was paid in right and in wrong rollouts",
    "lazy": "the team with each agent's messages blank",
    "frontier": "accuracy against generated tokens",
}
SUFFIXES = (".pdf", ".svg", ".png")
LOOK = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # text stays text, which journals ask for
    "svg.fonttype": "none",
    "svg.hashsalt": "ccpo",
}
DATES = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {"Software": None}}


def plot(runs: Sequence[str | Path], kind: str, out: str | Path) -> Path:
    """Draw the figure ``kind`` of ``runs`` (folders) into ``out``; runs of one recipe are one method, with bands over its seeds. The same runs
    give the same file. Raises UserError for an unknown kind, an ending that is not pdf, svg or png, and runs without what it shows."""
    out = Path(out)
    if kind not in KINDS:
        raise UserError(f"there is no figure {kind!r}; --kind is one of {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"--out {str(out)!r}: a figure's file ends in {', '.join(SUFFIXES)}; the first two are vector graphics"
        )
    if not runs:
        raise UserError("name at least one run's folder")
    need_matplotlib()
    import matplotlib

    from ccpo.plot.data import RunData, methods_of
    from ccpo.plot.figures import FIGURES

    methods = methods_of([RunData(Path(run)) for run in dict.fromkeys(map(str, runs))])
    with matplotlib.rc_context(LOOK):
        figure = FIGURES[kind](methods)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(out, dpi=200, metadata=DATES[out.suffix.lower()])
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}") from None
        finally:
            matplotlib.pyplot.close(figure)
    return out
