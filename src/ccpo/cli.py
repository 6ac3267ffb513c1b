"""The command line: ``ccpo train | eval | report | watch | diagnose | chat | compare | plot | plan | bench | doctor | recipes``.

It parses, wires and prints; nothing imports it.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ccpo.errors import RunFailure, UserError

app = typer.Typer(
    name="ccpo",
    help="Train teams of language-model agents and pay each agent the credit it earned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

diagnose = typer.Typer(help="Measure what a team's credit and gradients look like.", no_args_is_help=True)
app.add_typer(diagnose, name="diagnose")

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. trainer.steps=50")
]


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="a recipe's file, or the name of a shipped one: demo, vote, …")
    ] = None,
    set: Set = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="go on with this run's folder")] = None,
    steps: Annotated[int | None, typer.Option(help="with --resume: a new last step")] = None,
    launch: Annotated[
        str | None,
        typer.Option(metavar="torchrun:N|ray", help="train in N processes of this machine, or on Ray's workers"),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="with --launch ray: how many")] = 1,
    address: Annotated[
        str | None, typer.Option(metavar="auto|HOST:PORT", help="with --launch ray: the cluster; default: a local one")
    ] = None,
    restarts: Annotated[int, typer.Option(min=0, help="with --launch ray: new starts after a lost worker or node")] = 3,
) -> None:
    """Train a team from a recipe, or go on with a run."""
    from ccpo import runs as library
    from ccpo.display import TerminalReporter, tell_result

    if (recipe is None) == (resume is None):
        raise UserError("give either a recipe (ccpo train demo) or a run to go on with (ccpo train --resume runs/demo)")
    if resume is not None and set:
        raise UserError("--set does not go with --resume: a run keeps its recipe; only --steps can be raised")
    if steps is not None and resume is None:
        raise UserError("--steps goes with --resume; for a new run use --set trainer.steps=N")
    if launch is not None:
        from ccpo.launch import start

        ray = {"workers": workers, "address": address, "restarts": restarts}
        code = start(launch, recipe, set or (), resume, steps, **ray)
        raise typer.Exit(code)
    with TerminalReporter() as reporter:
        if resume is not None:
            result = library.resume(resume, steps=steps, reporter=reporter)
        else:
            result = library.train(recipe, set or (), reporter=reporter)
    if result.first:
        tell_result(result)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    data: Annotated[Path | None, typer.Option(help="a data file; default: the recipe's own data sets")] = None,
    samples: Annotated[int, typer.Option(min=1, help="samples a problem, for pass@k and majority@k")] = 1,
    problems: Annotated[int | None, typer.Option(min=1, help="problems of each data set")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="default: the recipe's; 1.0 with several samples")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="write the report here")] = None,
) -> None:
    """Evaluate a trained team: its accuracy, each agent alone, and the team without each agent."""
    from ccpo.display import evaluation_tables, progress_note
    from ccpo.evaluate import Exam
    from ccpo.evaluate import evaluate as run_evaluation
    from ccpo.runfolder import write_json
    from ccpo.runs import open_crew
    from ccpo.tasks import load_file

    tests = {data.stem: load_file(data)} if data is not None else None
    with progress_note("loading"):
        setup, crew, checkpoint = open_crew(run)
    settings = setup.config.eval
    default = settings.temperature if samples == 1 else settings.temperature or 1.0
    exam = Exam(
        problems=problems or settings.problems,
        samples=samples,
        temperature=default if temperature is None else temperature,
        top_p=settings.top_p,
        ablations=settings.ablations,
        seed=setup.config.run.seed,
    )
    with progress_note("evaluating"):
        reports = run_evaluation(setup.team, tests or setup.tests, crew.voices(), setup.limits, exam)
    evaluation_tables(reports, checkpoint)
    if json is not None:
        write_json(json, {"checkpoint": str(checkpoint), "exam": exam.__dict__, "reports": reports})
        typer.echo(f"Report: {json}")


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="folders of runs; several are laid over one another")
    ],
    out: Annotated[
        Path | None, typer.Option(help="the file; default: report.html in the run's folder, of several runs here")
    ] = None,
) -> None:
    """Write one page, a file on its own, that shows who earned what."""
    from ccpo.report import write_report

    typer.echo(f"report: {write_report(runs, out)}")


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="a run's folder; it may still be training")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8765,
) -> None:
    """Show the page of a run on 127.0.0.1 and follow the training."""
    from ccpo.report import serve

    serve(run, port, typer.echo)


@diagnose.command()
def variance(
    source: Annotated[str, typer.Argument(metavar="RUN|RECIPE", help="a run's folder, or a recipe as it starts")],
    rules: Annotated[
        str | None, typer.Option(metavar="RULE,…", help="credit rules, each with an estimator if wanted: removal/none")
    ] = None,
    advantage: Annotated[str | None, typer.Option(help="the estimator of the others; default: the recipe's")] = None,
    batches: Annotated[int, typer.Option(min=3, help="batches of the recipe's problems × samples")] = 32,
    problems: Annotated[int, typer.Option(min=0, help="problems whose turns are replayed; 0: none")] = 16,
    truth: Annotated[int, typer.Option(min=2, help="replays of each text")] = 32,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="the same problems in every batch: the noise of sampling alone")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="write the report here")] = None,
    set: Set = None,
) -> None:
    """Noise and bias of each rule's gradient, credit fidelity, influence, and a test of Lemma A.1."""
    from ccpo.diagnose import Effort
    from ccpo.diagnose.report import variance_tables
    from ccpo.diagnosis import variance as probe
    from ccpo.display import progress_note
    from ccpo.runfolder import write_json

    effort = Effort(batches=batches, problems=problems, truth=truth, repeat=repeat)
    names = [name.strip() for name in rules.split(",")] if rules is not None else []
    with progress_note("loading") as note:
        report = probe(source, rules=names, advantage=advantage, overrides=set or (), effort=effort, note=note)
    variance_tables(report)
    if json is not None:
        write_json(json, report)
        typer.echo(f"Report: {json}")


@diagnose.command("free-riding")
def free_riding(
    run: Annotated[Path, typer.Argument(metavar="RUN|EPISODES", help="a run's folder, or a file of logged episodes")],
    problems: Annotated[int, typer.Option(min=2, help="held-out problems that a run's team is played on")] = 100,
    samples: Annotated[int, typer.Option(min=1, help="joint rollouts of each")] = 4,
    replayed: Annotated[int, typer.Option(min=0, help="of these problems, how many are replayed; 0: none")] = 16,
    replays: Annotated[int, typer.Option(min=2, help="replays of each text")] = 16,
    half_width: Annotated[float, typer.Option(help="the half-width that an interval is to have")] = 0.05,
    data: Annotated[Path | None, typer.Option(help="a data file; default: the recipe's first data set")] = None,
    json: Annotated[Path | None, typer.Option(help="write the report here")] = None,
) -> None:
    """What each agent contributes, by removal, blank messages, replays and Shapley values; who coasts."""
    from ccpo.diagnose.free_riding import Thoroughness
    from ccpo.diagnose.free_riding_report import free_riding_table
    from ccpo.diagnosis import free_riding as measure
    from ccpo.display import progress_note
    from ccpo.runfolder import write_json
    from ccpo.tasks import load_file

    effort = Thoroughness(problems=problems, samples=samples, replayed=replayed, replays=replays, half_width=half_width)
    with progress_note("loading") as note:
        report = measure(run, data=load_file(data) if data is not None else None, effort=effort, note=note)
    free_riding_table(report)
    if json is not None:
        write_json(json, report)
        typer.echo(f"Report: {json}")


@diagnose.command()
def alarms(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    json: Annotated[Path | None, typer.Option(help="write the alarms here")] = None,
) -> None:
    """What is going wrong in a run, in words, with what to try."""
    from ccpo.alarms import find_alarms
    from ccpo.display import alarm_lines
    from ccpo.runfolder import write_json

    left_out: list[str] = []
    found = find_alarms(run, left_out.append)
    alarm_lines(found, left_out)
    if json is not None:
        write_json(json, found)
        typer.echo(f"Alarms: {json}")


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    question: Annotated[str, typer.Argument(help="the problem")],
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Ask a trained team one question; shows what every agent says."""
    from ccpo.chat import ask
    from ccpo.display import conversation, progress_note

    with progress_note("loading"):
        rollout = ask(run, question, temperature=temperature, seed=seed)
    conversation(rollout)


@app.command()
def compare(
    study: Annotated[str, typer.Argument(help="a study's file, or the name of a shipped one: short")],
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="cells that run at once, one core each")] = 1,
    folder: Annotated[Path | None, typer.Option(help="the study's folder; default: runs/study-NAME")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="run only these: method=…, task=…, seed=…")
    ] = None,
    phase: Annotated[list[str] | None, typer.Option(help="run only this: tune, main, sweep")] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0, help="start no cell after so many minutes")] = None,
    cell_minutes: Annotated[float | None, typer.Option(min=0.01, help="a cell that takes longer has failed")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="run failed cells again")] = False,
    keep_runs: Annotated[bool, typer.Option("--keep-runs", help="keep the run folder of each cell")] = False,
    listing: Annotated[bool, typer.Option("--list", help="show what would run and what it costs; run nothing")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="run nothing; write results, figures and page again")
    ] = False,
    results: Annotated[Path | None, typer.Option(help="take over the cells of this results file")] = None,
    page: Annotated[Path | None, typer.Option(help="write the page here, its figures and results beside it")] = None,
) -> None:
    """Compare methods on tasks at equal generated tokens. Stop it and start it again as you like, in several processes too."""
    from ccpo.compare.command import Options
    from ccpo.compare.command import compare as run_study
    from ccpo.compare.runner import PHASES, Settings

    settings = Settings(
        jobs=jobs,
        minutes=max_minutes,
        cell_minutes=cell_minutes,
        phases=phase or PHASES,
        retry_failed=retry_failed,
        keep_runs=keep_runs,
    )
    options = Options(folder=folder, results=results, page=page, report=report, listing=listing, only=only or ())
    if not run_study(study, options, settings) and not (listing or report):
        raise typer.Exit(1)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="runs' folders; those of one recipe are drawn together")],
    kind: Annotated[str, typer.Option(help="curves, credit, lazy or frontier")],
    out: Annotated[Path, typer.Option(help="the figure's file: .pdf, .svg or .png")],
) -> None:
    """Draw a figure of runs for a paper: vector, colour-blind safe, bands over seeds."""
    from ccpo.plot import plot as draw

    typer.echo(f"Figure: {draw(runs, kind, out)}")


@app.command()
def plan(
    source: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="a recipe, or the folder of a run like it")],
    gpus: Annotated[int, typer.Option(help="how many, one process each")] = 1,
    gpu: Annotated[str, typer.Option(help="h100, a100-80, …; cpu: this machine, measured")] = "h100",
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="[AGENT=]NAME", help="a well-known shape in the place of the models' own"),
    ] = None,
    length_share: Annotated[float, typer.Option(help="mean length of a text, as a share of its most tokens")] = 0.5,
    length_spread: Annotated[float, typer.Option(help="deviation of lengths over their mean")] = 0.5,
    problem_tokens: Annotated[
        int | None, typer.Option(help="plan without the recipe's data, with problems of so many tokens")
    ] = None,
    network: Annotated[float | None, typer.Option(help="GB/s from a GPU to another node; default: the card's")] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="up to 1,024 GPUs, with stragglers and failures")
    ] = False,
    slowness: Annotated[float, typer.Option(help="with --simulate: spread of the ranks' speed (log-normal)")] = 0.08,
    mtbf: Annotated[float, typer.Option(help="with --simulate: hours between failures of one GPU")] = 50_000.0,
    restart: Annotated[float, typer.Option(help="with --simulate: seconds until a run goes on")] = 300.0,
    json: Annotated[Path | None, typer.Option(help="write the plan here")] = None,
    set: Set = None,
) -> None:
    """Predict what a run will cost before it begins: memory, seconds, tokens, GPU-hours, the best placement."""
    from ccpo.display import progress_note
    from ccpo.forecast.cluster import Weather
    from ccpo.forecast.command import Wishes
    from ccpo.forecast.command import plan as make_plan
    from ccpo.forecast.report import show
    from ccpo.runfolder import write_json

    weather = Weather(spread=slowness, mtbf=mtbf, restart=restart)
    lengths = {"length_share": length_share, "length_spread": length_spread, "problem_tokens": problem_tokens}
    asked = {"gpus": gpus, "gpu": gpu, "shape": tuple(shape or ()), "network": network, "simulate": simulate}
    wishes = Wishes(**asked, **lengths, weather=weather)
    with progress_note("planning"):
        found = make_plan(source, set or (), wishes)
    show(found)
    if json is not None:
        write_json(json, found)
        typer.echo(f"Plan: {json}")


@app.command()
def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="decode, update, step, counterfactuals, credit, scaling, memory; default: all"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="small shapes and few repeats")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; default: torch's own")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="how often each side is timed")] = None,
    out: Annotated[Path | None, typer.Option(help="write the results here, as JSON")] = None,
    page: Annotated[Path | None, typer.Option(help="write the tables here, as Markdown")] = None,
) -> None:
    """Measure speed beside transformers, TRL and CoMLRL, and the machine's limit. Fails on wrong results, never on timings."""
    from ccpo.bench.command import bench as run_bench

    run_bench(parts or (), quick=quick, device=device, threads=threads, repeats=repeats, out=out, page=page)


@app.command()
def doctor() -> None:
    """Versions, devices, engines; what is missing and how to get it."""
    from ccpo.doctor import diagnose

    if not diagnose():
        raise typer.Exit(1)


@app.command()
def recipes() -> None:
    """The recipes that ship with the package."""
    from ccpo.config import shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for name, path in shipped.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        typer.echo(f"{name:<{width}} {first}")


def _tell(what: str, error: Exception) -> None:
    """To the terminal, unless another rank tells it."""
    if not getattr(error, "told", False):
        print(f"{what}: {error}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line: exit code 2 for the user's mistakes, 1 for a failure; no traceback for a mistake."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app(standalone_mode=True)
    except UserError as error:
        _tell("Error", error)
        sys.exit(2)
    except RunFailure as error:
        _tell("Failed", error)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
