"""A plan on the terminal, in 80 columns, and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

GIGA = 1e9
WIDTH = 80


def show(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a plan of :func:`ccpo.forecast.command.plan`."""
    console = console or Console()
    out = _Printer(console)
    out(f"[bold]{escape(plan['name'])}[/bold] on {plan['gpus']} × {plan['gpu']}", plain=False)
    for policy in plan["policies"]:
        state = "trained" if policy["trained"] else "frozen"
        out(f"{policy['name']}: {policy['shape']}, {policy['parameters'] / 1e6:,.1f}M parameters, {state}")
    tokens = plan["tokens"]
    out(
        f"A step: {plan['problems']} problems × {plan['samples']} rollouts; {_count(tokens['generated'])} tokens generated, "
        f"{tokens['counterfactual_share']:.0%} of them counterfactual; {_count(tokens['prefill'])} prompt tokens; "
        f"{_count(tokens['trained'])} trained on."
    )
    if plan["gpu"] == "cpu":
        _seconds(plan["seconds"], console)
    else:
        _placements(plan, console)
    _totals(plan, out)
    if plan.get("lora"):
        lora = plan["lora"]
        out(
            f"As adapters on one base (lora), {lora['policies']} policies need {lora['ratio']:.2f} times the memory of one."
        )
    for row in plan["advice"]:
        out(f"Note: {row}.")
    if plan["simulation"]:
        _simulation(plan["simulation"], console)
    out("Assumed: " + "; ".join(plan["assumed"]) + ".", style="dim")


class _Printer:
    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, text: str, *, style: str | None = None, plain: bool = True) -> None:
        self.console.print(escape(text) if plain else text, style=style, highlight=False)


def _seconds(seconds: Mapping[str, float], console: Console) -> None:
    table = _table("seconds of a step")
    for name, value in seconds.items():
        table.add_row(name, _time(value))
    console.print(table)


def _placements(plan: Mapping[str, Any], console: Console) -> None:
    table = _table("placement", "GB/GPU", "step", "decode", "update", "talk", "alone", "")
    for option in plan["placements"]:
        if option["seconds"] is None:
            continue
        s, mark = option["seconds"], "best" if option["placement"] == plan["best"] else ""
        table.add_row(
            option["placement"],
            f"{option['memory']['peak'] / GIGA:.1f}{'' if option['fits'] else ' >'}",
            _time(s["total"]),
            _time(s["prefill"] + s["decode"]),
            _time(s["update"] + s["optimizer"]),
            _time(s["communication"]),
            _time(s["host"] + s["gather"] + s["refresh"]),
            mark,
        )
    console.print(table)
    for option in plan["placements"]:
        if option["why"]:
            console.print(escape(f"{option['placement']}: not here, {option['why']}."), style="dim", highlight=False)
    chosen = next((o for o in plan["placements"] if o["placement"] == plan["best"]), None)
    if chosen is None:
        console.print(
            f"Nothing fits into {plan['card']['memory'] / GIGA:.0f} GB ('>'): use more or larger GPUs, a smaller model, or lower "
            "optim.microbatch_tokens and rollout.decode_tokens.",
            style="yellow",
            highlight=False,
        )
        return
    console.print(escape(f"Best: {chosen['placement']} ({chosen['settings']})."), highlight=False)
    memory = _table("GB on a GPU", "")
    for name, value in chosen["memory"].items():
        if value and name not in ("stays", "decoding", "updating"):
            memory.add_row(name, f"{value / GIGA:.2f}")
    console.print(memory)


def _totals(plan: Mapping[str, Any], out: _Printer) -> None:
    total = plan["total"]
    if total is None:
        return
    out(
        f"{_time(total['step'])} a step, {total['tokens_per_second']:,.0f} generated tokens a second; {total['steps']:,} steps: "
        f"{_time(total['run'])}, {total['gpu_hours']:,.1f} {'process' if plan['gpu'] == 'cpu' else 'GPU'}-hours, without evaluations."
    )


def _simulation(simulation: Mapping[str, Any], console: Console) -> None:
    table = _table("GPUs", "problems", "step", "problems/h", "efficiency", "waiting", "alone", "lost", "failures")
    for row in simulation["rows"]:
        table.add_row(
            f"{row['ranks']:,}",
            f"{row['problems']:,}",
            _time(row["step"]),
            f"{row['rate']:,.0f}",
            *(f"{max(0.0, row[key]):.0%}" for key in ("efficiency", "straggling", "alone", "lost")),
            str(row["failures"]),
        )
    w = simulation["weather"]
    console.print(
        f"Simulated ({simulation['placement']}): slowness {w['spread']:g} (log-normal), a failure a GPU every {w['mtbf']:,.0f} h, "
        f"restart {w['restart']:g} s, a checkpoint every {w['every']} steps ({w['write']:.0f} s), {w['steps']} steps, seed {w['seed']}.",
        highlight=False,
    )
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    if len(columns) == 1:
        table.add_column("", justify="right")
    return table


def _count(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / 3600:,.0f} h"
