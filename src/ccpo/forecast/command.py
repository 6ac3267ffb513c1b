"""``ccpo plan``: what a run will cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ccpo.comm import Comm
from ccpo.config import RunConfig, load_recipe
from ccpo.engines.sharded import ShardedEngine
from ccpo.errors import UserError
from ccpo.forecast.cards import CPU, NODE, Card, card_of
from ccpo.forecast.cluster import SIZES, Weather, simulate
from ccpo.forecast.history import of_run
from ccpo.forecast.memory import SETTINGS, Placement, lora_ratio
from ccpo.forecast.place import Option, best, held_by, mean_seconds, options, shapes_of, tokens_of
from ccpo.forecast.roofline import Roofline, cut
from ccpo.forecast.seconds import Machine, StepSeconds, step_cost
from ccpo.forecast.shapes import Shape
from ccpo.forecast.standin import CountingReader, Lengths, StandInEngine
from ccpo.forecast.work import StepWork, Subject, make_subject, work_of
from ccpo.types import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What ``ccpo plan`` was asked for, as its options are. Raises UserError for values that make no sense."""

    gpus: int = 1
    gpu: str = "h100"
    length_share: float = 0.5
    length_spread: float = 0.5
    problem_tokens: int | None = None
    shape: tuple[str, ...] = ()
    network: float | None = None
    simulate: bool = False
    weather: Weather = Weather()

    def __post_init__(self) -> None:
        for option, value, low, high in (
            ("--gpus", self.gpus, 1, 100_000),
            ("--length-share", self.length_share, 0.001, 1),
            ("--length-spread", self.length_spread, 0, 3),
            ("--problem-tokens", self.problem_tokens, 1, 10**6),
            ("--network", self.network, 0.001, 10**4),
            ("--slowness", self.weather.spread, 0, 2),
            ("--mtbf", self.weather.mtbf, 0.01, 10**9),
            ("--restart", self.weather.restart, 0, 10**6),
        ):
            if value is not None and not low <= value <= high:
                raise UserError(f"{option}: found {value:g}; it is a number from {low:g} to {high:g}")
        if self.gpu.lower() == CPU:
            if self.gpus > 1:
                raise UserError(
                    f"--gpus: found {self.gpus} with --gpu cpu, whose processes would share the cores; set --gpus 1"
                )
            if self.simulate:
                raise UserError("--simulate is for GPUs; name a card with --gpu, for example --gpu h100")
        else:
            card_of(self.gpu)


def plan(source: str, overrides: Sequence[str] = (), wishes: Wishes | None = None) -> dict[str, Any]:
    """The plan of a recipe, or of a run's folder with the lengths that it has had, as plain data. Raises UserError."""
    wishes = wishes or Wishes()
    config, lengths, silent, assumed = _source(source, overrides, wishes)
    _check(config, wishes)
    subject = make_subject(config, wishes.problem_tokens)
    shapes = shapes_of(subject, wishes.shape)
    work = work_of(subject, lengths, silent, {name: shape.positions for name, shape in shapes.items()})
    found = _described(subject, shapes, work, wishes)
    found["assumed"] = [*assumed, *subject.assumed, *found["assumed"]]
    return found


def _source(
    source: str, overrides: Sequence[str], wishes: Wishes
) -> tuple[RunConfig, Lengths, Mapping[str, float] | None, list[str]]:
    folder = Path(source)
    if (folder / "recipe.json").is_file():
        config, seen, silent = of_run(folder, overrides)
        if seen:
            return (
                config,
                Lengths(share=wishes.length_share, spread=wishes.length_spread, seen=seen),
                silent,
                [f"lengths and rows without gradient as in the last steps of {source}"],
            )
    else:
        config = load_recipe(source, overrides)
    text = f"texts have {wishes.length_share:.0%} of their most tokens on average, deviation {wishes.length_spread:.0%} of it, log-normal"
    lengths = Lengths(share=wishes.length_share, spread=wishes.length_spread)
    return config, lengths, None, [text, "half of all verdicts are right, by coins"]


def _check(config: RunConfig, wishes: Wishes) -> None:
    prompts = config.rollout.prompts
    if wishes.gpus > prompts:
        raise UserError(
            f"--gpus: found {wishes.gpus}, but a step has only rollout.prompts = {prompts} problems to share out; ask for at most {prompts} "
            f"GPUs, or --set rollout.prompts={wishes.gpus}"
        )
    if config.model.engine == "vllm":
        raise UserError(
            "model.engine is 'vllm', whose speed ccpo plan does not know; plan with --set model.engine=native"
        )


def _described(
    subject: Subject, shapes: Mapping[str, Shape], work: Sequence[StepWork], wishes: Wishes
) -> dict[str, Any]:
    config = subject.setup.config
    tokens = tokens_of(work)
    generated = sum(w.generated for w in work) / len(work)
    found: dict[str, Any] = {
        "name": config.run.name,
        "gpus": wishes.gpus,
        "gpu": wishes.gpu.lower(),
        "policies": [
            {
                "name": name,
                "shape": shape.name,
                "parameters": shape.parameters,
                "trained": name in subject.trained,
            }
            for name, shape in shapes.items()
        ],
        "problems": config.rollout.prompts,
        "samples": config.rollout.samples,
        "steps": config.trainer.steps,
        "tokens": {
            **tokens,
            "generated": generated,
            "trained": sum(w.trained for w in work) / len(work),
            "counterfactual_share": tokens["counterfactual"] / generated if generated else 0.0,
        },
        "phases": [{"active": w.active, "tokens": dict(w.tokens)} for w in work],
        "assumed": [],
        "advice": [],
        "simulation": None,
        "total": None,
    }
    if wishes.gpu.lower() == CPU:
        from ccpo.forecast.measure import measured_step

        every = [measured_step(w, shapes, subject) for w in work]
        seconds = mean_seconds(every)
        found["assumed"].append("measured just now on layers of these shapes, by this library's decoder and update")
        found["seconds"] = {**asdict(seconds), "total": seconds.total}
        found["total"] = _total(seconds, generated, config, 1)
        return found
    return found | _on_cards(found, subject, shapes, work, wishes, generated)


def _on_cards(
    found: Mapping[str, Any],
    subject: Subject,
    shapes: Mapping[str, Shape],
    work: Sequence[StepWork],
    wishes: Wishes,
    generated: float,
) -> dict[str, Any]:
    config = subject.setup.config
    card = card_of(wishes.gpu)
    machine = machine_of(card, wishes)
    every = options(subject, shapes, work, machine)
    chosen = best(every, config)
    efficiency = machine.roof.efficiency
    return {
        "card": asdict(card),
        "placements": [_plain(o) for o in every],
        "best": chosen.placement if chosen else None,
        "total": _total(chosen.seconds, generated, config, wishes.gpus) if chosen and chosen.seconds else None,
        "advice": _advice(subject, shapes, work, card, chosen),
        "lora": _adapters(subject, shapes, every),
        "simulation": _simulation(subject, shapes, work, wishes, chosen.placement)
        if chosen and wishes.simulate
        else None,
        "assumed": [
            *found["assumed"],
            f"of the card's figures ({card.source}) {efficiency.prefill:.0%} of the operations in prefill, {efficiency.update:.0%} in the "
            f"update, {efficiency.bandwidth:.0%} of the bandwidth, and {1e6 * efficiency.launch:.0f} µs a layer and decoding step: from this "
            "library's measurements on one H200",
            "prompts, credit, alarms and episodes take the time that they take on this machine; verdicts and evaluations are left out",
            *([f"one node has {NODE} GPUs"] if wishes.gpus > NODE else []),
        ],
    }


def machine_of(card: Card, wishes: Wishes, ranks: int | None = None) -> Machine:
    network = card.network if wishes.network is None else wishes.network * 1e9
    return Machine(roof=Roofline(card=card), ranks=ranks or wishes.gpus, network=network, gather=gather_seconds())


class _Echo(Comm):
    """One rank that still packs and reads what it says."""

    def everywhere(self, work: Any) -> list[bytes]:
        return [work()]


def gather_seconds(tokens: int = 20_000) -> float:
    """Seconds of this machine to pack and read one token of a completion that travels between ranks."""
    inner = StandInEngine(policy="", lengths=Lengths(share=1.0, spread=0.0), reader=CountingReader())
    engine = ShardedEngine(inner, _Echo())
    requests = [Request(prompt_ids=(i,), seed=i, max_tokens=500) for i in range(tokens // 500)]
    started = time.perf_counter()
    engine.generate(requests)
    return max(0.0, time.perf_counter() - started - inner.seconds) / tokens


def _plain(option: Option) -> dict[str, Any]:
    seconds, memory = option.seconds, option.memory
    return {
        "placement": str(option.placement),
        "settings": SETTINGS[option.placement],
        "fits": option.fits,
        "why": option.why,
        "seconds": None if seconds is None else {**asdict(seconds), "total": seconds.total},
        "memory": None
        if memory is None
        else {
            **asdict(memory),
            "stays": memory.stays,
            "decoding": memory.decoding,
            "updating": memory.updating,
            "peak": memory.peak,
        },
    }


def _total(seconds: StepSeconds, generated: float, config: RunConfig, gpus: int) -> dict[str, float]:
    steps = config.trainer.steps
    if config.trainer.tokens is not None:
        steps = min(steps, -(-config.trainer.tokens // max(1, round(generated))))
    run = steps * seconds.total
    return {
        "step": seconds.total,
        "steps": steps,
        "tokens_per_second": generated / seconds.total,
        "run": run,
        "gpu_hours": run * gpus / 3600,
    }


def _adapters(subject: Subject, shapes: Mapping[str, Shape], every: Sequence[Option]) -> dict[str, Any] | None:
    """How the memory of adapters on one base grows with the number of agents."""
    found = next(o for o in every if o.placement is Placement.LORA)
    if found.memory is None or len(shapes) < 2:
        return None
    shape, lora, m = next(iter(shapes.values())), subject.setup.config.model.lora, found.memory
    own = subject.setup.config.trainer.async_depth > 0
    cache, room = m.cache / (len(shapes) if own else 1), m.copies + m.activations + m.logits
    ratio = lora_ratio(shape, len(shapes), lora.rank, own_decoders=own, cache=cache, room=room)
    return {"policies": len(shapes), "ratio": ratio}


def _advice(
    subject: Subject, shapes: Mapping[str, Shape], work: Sequence[StepWork], card: Card, chosen: Option | None
) -> list[str]:
    """What stands out of the plan and can be set otherwise."""
    config, found = subject.setup.config, []
    budget = config.rollout.decode_tokens
    rows = [
        batch.rows
        for w in work
        for name, calls in w.calls.items()
        if name in shapes
        for call in calls
        for batch in (cut(call[: 4 * config.rollout.samples], shapes[name], budget) if budget != "auto" else ())
    ]
    asked = max(len(call) for w in work for calls in w.calls.values() for call in calls)
    if chosen and chosen.memory and rows and max(rows) < min(32, asked):
        free = card.memory - chosen.memory.peak
        cost = max(s.cached for s in shapes.values()) * 2 * sum(1 for _ in shapes)
        found.append(
            f"rollout.decode_tokens = {budget:,} lets only {max(rows)} texts be decoded together; this card has room for about "
            f"{budget + int(0.8 * free / cost):,} (auto)"
        )
    if chosen and chosen.placement is Placement.LORA and config.model.sharing != "lora":
        found.append("only adapters fit, which train fewer weights than the recipe does (model.sharing: lora)")
    return found


def _simulation(
    subject: Subject, shapes: Mapping[str, Shape], work: Sequence[StepWork], wishes: Wishes, placement: Placement
) -> dict[str, Any]:
    config, card = subject.setup.config, card_of(wishes.gpu)
    held = held_by(subject, shapes, placement)
    base = machine_of(card, wishes)
    saved = sum(12 * h.shape.parameters for h in held.values() if h.trained)
    weather = replace(wishes.weather, every=config.trainer.save_every or config.trainer.steps, write=saved / DISK)

    def cost(ranks: int, problems: int) -> tuple[StepSeconds, int]:
        machine, times = replace(base, ranks=ranks), problems // config.rollout.prompts
        seconds = mean_seconds([step_cost(w, held, config, machine, placement, times=times)[0] for w in work])
        barriers = max(
            sum(len(c) for c in w.calls.values()) + sum(len(r) for r in w.rows.values()) * config.optim.epochs
            for w in work
        )
        return seconds, barriers

    sizes = [n for n in SIZES if placement in (Placement.DDP, Placement.LORA) or n >= wishes.gpus]
    rows = simulate(cost, config.rollout.prompts, weather, sizes)
    return {"placement": str(placement), "weather": asdict(weather), "rows": [asdict(row) for row in rows]}


DISK = 2e9  # bytes a second at which the first rank writes a checkpoint: assumed
