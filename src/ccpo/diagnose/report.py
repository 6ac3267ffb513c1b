"""The probe's report on a terminal: tables that fit 80 columns, and a sentence where something is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

SAME = 0.9995  # a correlation that is shown as 1
LEGEND = (
    "s/n: signal-to-noise of the gradient in 1,000 generated tokens; × shared: the same over shared reward's; bias: distance from the "
    "gradient of the expected reward at the best scale; corr: of advantages with shared reward's; fidelity: rank correlation with "
    "what the texts were worth when replayed."
)


def variance_tables(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a report of :func:`ccpo.diagnose.probe_variance`."""
    console = console or Console()
    rules: Mapping[str, Any] = report["rules"]
    console.print(
        f"{escape(report['subject'])}: {report['batches']} batches of {'the same ' if report['repeat'] else ''}{report['prompts']} problems × "
        f"{report['samples']} rollouts, {report['seconds']:.0f} s",
        highlight=False,
    )
    console.print(_costs(rules))
    for agent in dict.fromkeys(agent for rule in rules.values() for agent in rule["agents"]):
        console.print(_agent(agent, rules))
    console.print(LEGEND, style="dim", highlight=False)
    if report["influence"]:
        console.print(_influence(report["influence"]))
    for line in sentences(report):
        console.print(escape(line), highlight=False, style="yellow" if line.startswith("Warning") else None)


def sentences(report: Mapping[str, Any]) -> list[str]:
    """What the tables do not say: the test of Lemma A.1, how exact the projection is, how sure the truth."""
    lines = [
        _baseline(agent, found) for agent, found in report["baseline"].items() if found["best"]["value"] is not None
    ]
    lines += [_lemma(agent, found) for agent, found in report["lemma"].items()]
    errors = [
        abs(agent["norm_sketch"] / agent["norm_exact"] - 1)
        for rule in report["rules"].values()
        for agent in rule["agents"].values()
        if agent["norm_exact"]
    ]
    if errors:
        lines.append(
            f"Projection on {report['buckets']} numbers: gradient norms within {max(errors):.1%} of those over all weights."
        )
    for agent, share in ((report["truth"] or {}).get("reliability") or {}).items():
        if share is not None and share < 0.5:
            lines.append(
                f"Warning: {agent}: {1 - share:.0%} of the spread of the replayed truth is sampling noise, so that fidelity "
                "is understated; raise --truth."
            )
    return lines


def _baseline(agent: str, found: Mapping[str, Any]) -> str:
    line = f"{agent}: the best constant baseline is {_number(found['best'])}, the mean reward {found['mean']:.2f}"
    if found["change"] is None or found["change"]["value"] is None:
        return line + "."
    value, error = found["change"]["value"], found["change"]["error"]
    size = f"{value:+.0%}" if error is None else f"{value:+.0%} ± {error:.0%}"
    return f"{line}; raw removal credit changes the gradient's second moment by {size}."


def _lemma(agent: str, found: Mapping[str, Any]) -> str:
    if "untested" in found:
        return f"Lemma A.1, {agent}: not tested; {found['untested']}."
    numbers = (
        f"{_number(found['along'])} of the shared-reward gradient along it (p = {found['p_along']:.4f}), "
        f"{_number(found['size'])} in all directions (p = {found['p_anywhere']:.4f})"
        if found["p_anywhere"] is not None
        else f"p = {found['p_along']:.4f}"
    )
    if found["alarm"]:
        return (
            f"Warning: Lemma A.1, {agent}: the reward without it moves with its own text, {numbers}. Removal credit is "
            "biased for it by that much."
        )
    return f"Lemma A.1, {agent}: no sign that the reward without it moves with its own text, {numbers}."


def _costs(rules: Mapping[str, Any]) -> Table:
    table = Table(box=None)
    table.add_column("rule", overflow="fold")
    table.add_column("advantage")
    table.add_column("tokens a batch", justify="right")
    for name, rule in rules.items():
        table.add_row(escape(name), rule["estimator"], f"{rule['tokens']:,.0f}")
    return table


def _agent(agent: str, rules: Mapping[str, Any]) -> Table:
    table = Table(title=escape(agent), box=None, title_justify="left")
    table.add_column("rule", overflow="fold")
    for column in ("s/n", "× shared", "bias", "corr", "fidelity"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, rule in rules.items():
        if agent not in rule["agents"]:
            continue
        found = rule["agents"][agent]
        table.add_row(
            escape(name),
            _number(found["snr_1000_tokens"]),
            _number(found["ratio_to_shared"]),
            _number(found["bias"]),
            _correlation(found["shared_corr"]),
            _number(found["fidelity"]),
        )
    return table


def _influence(edges: list[Mapping[str, Any]]) -> Table:
    table = Table(title="how much a turn changes without a message", box=None, title_justify="left")
    table.add_column("message → turn", overflow="fold")
    for column in ("total variation", "KL, nats a token"):
        table.add_column(column, justify="right", no_wrap=True)
    for edge in edges:
        table.add_row(escape(f"{edge['speaker']} → {edge['reader']}"), _number(edge["distance"]), _number(edge["kl"]))
    return table


def _number(estimate: Mapping[str, float | None]) -> str:
    value, error = estimate["value"], estimate["error"]
    if value is None:
        return "–"
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


def _correlation(value: float | None) -> str:
    if value is None:
        return "–"
    return "1" if value > SAME else f"{value:.2f}"
