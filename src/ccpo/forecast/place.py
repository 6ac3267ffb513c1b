"""Which placement of a team's weights is best: all that a recipe allows, each with its memory and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ccpo.bootstrap import CONTEXT
from ccpo.build import is_remote
from ccpo.config import BootstrapSection, RunConfig
from ccpo.crew import check_sharding
from ccpo.errors import UserError
from ccpo.forecast.memory import Held, Memory, Placement
from ccpo.forecast.seconds import Machine, StepSeconds, step_cost
from ccpo.forecast.shapes import Shape, preset, shape_of
from ccpo.forecast.work import StepWork, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A placement with what it costs: ``seconds`` of a step, the mean over phases; ``memory``, the largest of them; ``why`` it cannot be had."""

    placement: Placement
    seconds: StepSeconds | None = None
    memory: Memory | None = None
    fits: bool = False
    why: str = ""


def shapes_of(subject: Subject, given: Sequence[str]) -> dict[str, Shape]:
    """The shape of each policy. ``given``: ``NAME``, a well-known shape in the place of all models', or ``AGENT=NAME`` of one agent's.

    Raises UserError.
    """
    setup, found = subject.setup, {}
    named: dict[str, str] = {}
    for text in given:
        agent, equals, name = text.rpartition("=")
        if equals and agent not in setup.team.agent_names:
            raise UserError(
                f"--shape {text}: the team has no agent {agent!r}; it has {', '.join(setup.team.agent_names)}"
            )
        named[agent] = name
    for agent, policy in setup.policy_of.items():
        if policy in found or is_remote(setup.config, agent):
            continue
        path, own = subject.policies[policy], agent in setup.config.agents and setup.config.agents[agent].model
        where = f"agents.{agent}.model" if own else "model.path"
        name = named.get(agent, named.get(""))
        if name is not None:
            found[policy] = preset(name, "--shape")
        elif path == "bootstrap":
            found[policy] = of_section(setup.config.bootstrap, len(subject.readers[policy]))
        else:
            found[policy] = shape_of(path, where)
    return found


def of_section(section: BootstrapSection, vocab: int) -> Shape:
    """The shape of the tiny base model that a ``bootstrap`` section describes."""
    return Shape(
        name="bootstrap",
        family="qwen2",
        hidden=section.hidden,
        layers=section.layers,
        heads=section.heads,
        kv_heads=section.kv_heads,
        head_dim=section.hidden // section.heads,
        mlp=section.mlp,
        vocab=vocab,
        tied=True,
        biases=True,
        positions=CONTEXT,
    )


def held_by(subject: Subject, shapes: Mapping[str, Shape], placement: Placement) -> dict[str, Held]:
    """Each policy's weights under a placement."""
    lora, trained = subject.setup.config.model.lora, subject.trained
    return {
        name: Held(
            shape=shape,
            trained=name in trained,
            adapter=shape.adapter(lora.rank, lora.targets) if placement is Placement.LORA else 0,
        )
        for name, shape in shapes.items()
    }


def options(subject: Subject, shapes: Mapping[str, Shape], work: Sequence[StepWork], machine: Machine) -> list[Option]:
    """Every placement, in the order of `Placement`."""
    return [_option(p, subject, shapes, work, machine) for p in Placement]


def best(every: Sequence[Option], config: RunConfig) -> Option | None:
    """The fastest that fits of those that train what the recipe trains (adapters or whole weights); else the fastest that fits; else None."""
    fitting = [o for o in every if o.fits]
    lora = config.model.sharing == "lora"
    same = [o for o in fitting if (o.placement is Placement.LORA) is lora]
    return min(same or fitting, key=lambda o: o.seconds.total, default=None)  # type: ignore[union-attr]


def _option(
    placement: Placement,
    subject: Subject,
    shapes: Mapping[str, Shape],
    work: Sequence[StepWork],
    machine: Machine,
) -> Option:
    why = _impossible(placement, subject.setup.config, shapes, machine.ranks)
    if why:
        return Option(placement=placement, why=why)
    held = held_by(subject, shapes, placement)
    config = subject.setup.config
    costs = [step_cost(w, held, config, machine, placement) for w in work]
    seconds = mean_seconds([s for s, _ in costs])
    memory = max((m for _, m in costs), key=lambda m: m.peak)
    return Option(placement=placement, seconds=seconds, memory=memory, fits=memory.peak <= machine.card.memory)


def mean_seconds(every: Sequence[StepSeconds]) -> StepSeconds:
    """Of the phases of a schedule, each as long as the others."""
    mean: dict[str, Any] = {f.name: sum(getattr(s, f.name) for s in every) / len(every) for f in fields(StepSeconds)}
    return StepSeconds(**mean)


def _impossible(placement: Placement, config: RunConfig, shapes: Mapping[str, Shape], ranks: int) -> str:
    """Why a recipe cannot be placed so; empty where it can."""
    if placement is Placement.LORA:
        if len(set(shapes.values())) > 1:
            return "the agents have different models, and adapters sit on one base"
        return ""
    sharded = placement in (Placement.FSDP2, Placement.OFFLOAD)
    if sharded and ranks == 1:
        return "one GPU has nothing to share its weights with"
    sharing = "separate" if config.model.sharing == "lora" else config.model.sharing
    model = config.model.model_copy(
        update={"shard": sharded, "offload": placement is Placement.OFFLOAD, "sharing": sharing}
    )
    try:
        check_sharding(config.model_copy(update={"model": model}))
    except UserError as error:
        return str(error)
    return ""


def placed(config: RunConfig) -> Placement:
    """The placement that the recipe itself names."""
    model = config.model
    if model.sharing == "lora":
        return Placement.LORA
    return Placement.OFFLOAD if model.shard and model.offload else Placement.FSDP2 if model.shard else Placement.DDP


def tokens_of(work: Sequence[StepWork]) -> dict[str, float]:
    """Tokens of a step by kind, the mean over phases."""
    kinds = list(work[0].tokens)
    return {kind: sum(w.tokens[kind] for w in work) / len(work) for kind in kinds}
