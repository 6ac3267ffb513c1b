"""Numbers and tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ccpo.compare.stats import Estimate
from ccpo.compare.summary import Contest, Marked, cell_text

__all__ = ["cell_text", "estimate", "folded", "marked", "number", "percent", "ratio", "section", "table"]


def estimate(found: Estimate, form: str = "{:.1%}") -> str:
    """``71.2 [68.0, 74.1]%`` for shares, ``0.62 [0.51, 0.77]`` with another form."""
    value, low, high = (form.format(x) for x in (found.value, found.low, found.high))
    if form.endswith("%}"):
        return f"{value[:-1]} [{low[:-1]}, {high[:-1]}]%"
    return f"{value} [{low}, {high}]"


def marked(found: Marked | None) -> str:
    """Tokens to a mark; ``>`` for a lower bound, and how many runs never reach it."""
    if found is None:
        return "–"
    value, low, high = (number(x) for x in (found.estimate.value, found.estimate.low, found.estimate.high))
    missed = f" ({found.censored} of {len(found.each)} not)" if found.censored else ""
    return f"{'> ' if found.beyond else ''}{value} [{low}, {high}]{missed}"


def ratio(contest: Contest | None) -> str:
    """The ratio of tokens to the mark; a bound where most runs of one side never reach it, nothing where that holds of both."""
    if contest is None or contest.ratio is None or contest.bound == "?":
        return "–"
    return (contest.bound + " " if contest.bound else "") + estimate(contest.ratio, "{:.2f}")


def section(title: str, *parts: str, picture: tuple[str | None, str] = (None, "")) -> str:
    """A heading, the picture where there is one, and paragraphs and tables below it."""
    link, text = picture
    return "\n\n".join([f"## {title}", *([f"![{text}]({link})"] if link else []), *parts])


def folded(summary: str, text: str) -> str:
    """A long table behind a line to click on."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def number(value: float) -> str:
    """``950``, ``12.3k``, ``1.25M``."""
    if value >= 999_500:
        return f"{value / 1e6:.2f}M"
    return f"{value / 1e3:.1f}k" if value >= 1000 else f"{value:.0f}"


def percent(share: float) -> str:
    return f"{share:.1%}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A Markdown table; ``align`` has an l or r a column. Raises ValueError where a row has another number of columns."""
    marks = {"l": "---", "r": "---:"}
    lines = [head, [marks[a] for a in align], *rows]
    if any(len(line) != len(head) for line in lines):
        raise ValueError(f"a table of {len(head)} columns has a row of {sorted({len(line) for line in lines})}")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
