"""Seconds and bytes of a step on GPUs: the work of :mod:`ccpo.forecast.work`, dealt to the ranks as the library deals it, on a roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from ccpo.comm import deal
from ccpo.config import RunConfig
from ccpo.engines.budget import decode_budget
from ccpo.engines.graphs import COLUMNS, ROWS, rounded
from ccpo.engines.sharded import shares
from ccpo.forecast import memory
from ccpo.forecast.cards import NODE, Card
from ccpo.forecast.memory import Held, Memory, Placement
from ccpo.forecast.roofline import Batch, Roofline, cut, update_flops
from ccpo.forecast.shapes import Shape
from ccpo.forecast.standin import Asked
from ccpo.forecast.work import StepWork
from ccpo.learner import TrainRow
from ccpo.learner.rows import number_segments, pack

LATENCY = 5e-6  # seconds of one message in a ring
TRAVELS = 16  # bytes of a completion's token: its id, its log-prob, its text
PCIE = 25e9  # bytes a second between a GPU and the CPU's memory: assumed, of the 32e9 of PCIe 4.0 x16
HOST = 20e9  # bytes a second that a rank's optimiser reaches in the CPU's memory: assumed
BYTES = {"float32": 4, "bfloat16": 2, "auto": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Of one rank, the one that has most to do. ``host`` and ``gather`` are not shared out."""

    prefill: float = 0.0
    decode: float = 0.0
    update: float = 0.0
    optimizer: float = 0.0
    refresh: float = 0.0
    communication: float = 0.0
    gather: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def shared_out(self) -> float:
        """What more ranks make shorter."""
        return self.prefill + self.decode + self.update


@dataclass(frozen=True, slots=True, kw_only=True)
class Micro:
    """A micro-batch: tokens that run, squared lengths that attention sees, tokens that are scored."""

    tokens: int
    squares: int
    scored: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs of one kind. ``gather``: seconds of this machine to pack and read one token of a completion that travels."""

    roof: Roofline
    ranks: int
    network: float
    gather: float = 0.0

    @property
    def card(self) -> Card:
        return self.roof.card

    @property
    def wire(self) -> float:
        """Bytes a second from one rank to the next of the ring."""
        return self.card.link if self.ranks <= NODE else min(self.card.link, self.network)

    def all_reduce(self, count: float) -> float:
        """``2 (n - 1) / n`` of the bytes pass each link of a ring (Patarasuk and Yuan 2009), in ``2 (n - 1)`` messages."""
        n = self.ranks
        return 0.0 if n == 1 else 2 * (n - 1) / n * count / self.wire + 2 * (n - 1) * LATENCY

    def all_gather(self, count: float) -> float:
        """Half of that; a reduce-scatter is the same the other way round."""
        return self.all_reduce(count) / 2


def of_rank(asked: Sequence[Asked], ranks: int) -> list[Asked]:
    """What the rank with most tokens decodes of a call."""
    if ranks == 1:
        return list(asked)
    parts = shares(asked, ranks)  # type: ignore[arg-type]
    return [asked[i] for i in max(parts, key=lambda part: sum(asked[i].length for i in part))]


def micro_batches(rows: Sequence[TrainRow], config: RunConfig, ranks: int, *, padded: bool) -> list[Micro]:
    """The micro-batches of the rank with most tokens."""
    segments = number_segments(rows)
    if ranks > 1:
        members: dict[int, list[int]] = {}
        for index, segment in enumerate(segments):
            members.setdefault(segment, []).append(index)
        pieces = list(members.values())
        size = [sum(len(rows[i].prompt_ids) + len(rows[i].token_ids) for i in piece) for piece in pieces]
        mine = max(deal(size, ranks), key=lambda part: sum(size[number] for number in part))
        chosen = sorted(i for number in mine for i in pieces[number])
        rows, segments = [rows[i] for i in chosen], [segments[i] for i in chosen]
    parts = pack(rows, segments, config.optim.microbatch_tokens, shared=not padded)
    return [_micro([rows[i] for i in part], padded=padded) for part in parts]


def _micro(rows: Sequence[TrainRow], *, padded: bool) -> Micro:
    prompts = {row.prompt_ids: len(row.prompt_ids) for row in rows}
    scored = sum(len(row.token_ids) for row in rows)
    if padded:
        longest, text = max(prompts.values()), max(len(row.token_ids) for row in rows)
        width = longest + text
        return Micro(tokens=len(rows) * width, squares=len(rows) * width**2, scored=len(rows) * text)
    pairs = sum((len(r.prompt_ids) + len(r.token_ids)) ** 2 - len(r.prompt_ids) ** 2 for r in rows)
    squares = pairs + sum(n * n for n in prompts.values())
    return Micro(tokens=sum(prompts.values()) + scored - len(rows), squares=squares, scored=scored)


def passes(config: RunConfig, updates: int) -> float:
    """Passes over the rows of one update, in forward and backward passes: one, and a third more for each time that they are only scored, by the
    policy before its first update or by a reference."""
    source = config.loss.old_logprobs
    scored = (source == "learner" or (source == "auto" and updates > 1)) + (config.loss.kl != "none")
    return 1.0 + scored / (3.0 * config.optim.epochs)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Of the rank that has most to do: seconds, bytes of each engine's arena, and the most bytes of a batch beside it."""

    prefill: float
    decode: float
    caches: Mapping[str, float]
    sampling: float


def decoding_cost(work: StepWork, shapes: Mapping[str, Shape], roof: Roofline, ranks: int, budget: int) -> Decoding:
    """``budget``: tokens of one batch. Policies without a shape (endpoints) cost nothing here."""
    prefill = decode = sampling = 0.0
    caches: dict[str, float] = {}
    for name, calls in work.calls.items():
        shape = shapes.get(name.removesuffix("@start"))
        for call in calls if shape else ():
            every = cut(of_rank(call, ranks), shape, budget)
            prefill += sum(roof.prefill(shape, batch) for batch in every)
            decode += sum(roof.decode(shape, batch) for batch in every)
            caches[name] = max((caches.get(name, 0.0), *(_arena(shape, batch) for batch in every)))
            sampling = max((sampling, *(_sampling(shape, batch) for batch in every)))
    return Decoding(prefill=prefill, decode=decode, caches=caches, sampling=sampling)


def step_cost(
    work: StepWork,
    held: Mapping[str, Held],
    config: RunConfig,
    machine: Machine,
    placement: Placement,
    *,
    times: int = 1,
) -> tuple[StepSeconds, Memory]:
    """Seconds of the step, and bytes of a GPU. ``times``: of a step with so many times the problems."""
    lora, sharded = placement is Placement.LORA, placement in (Placement.FSDP2, Placement.OFFLOAD)
    roof, ranks, weight = machine.roof, machine.ranks, BYTES[config.model.weights]
    dealt = max(1, round(ranks / times))
    shapes = {name: h.shape for name, h in held.items()}
    decoding = decoding_cost(work, shapes, roof, dealt, together(held, config, machine, placement))
    update = optimizer = refresh = talk = 0.0
    most, logits = 0.0, 0.0
    checkpointing = config.model.gradient_checkpointing
    for name, minibatches in work.rows.items():
        policy = held[name]
        trained = policy.adapter if lora else policy.shape.parameters
        updates = config.optim.epochs * len(minibatches)
        repeats = config.optim.epochs * passes(config, updates)
        for rows in minibatches:
            parts = micro_batches(rows, config, dealt, padded=sharded)
            # with adapters the base has no gradient of its own: a third of the operations falls away
            part = 2 / 3 if lora else 1.0
            update += repeats * sum(
                roof.update(
                    policy.shape,
                    part * update_flops(policy.shape, m.tokens, m.squares, m.scored, checkpointing=checkpointing),
                )
                for m in parts
            )
            share = ranks if sharded else 1
            numbers = config.optim.epochs * trained / share
            offload = placement is Placement.OFFLOAD
            optimizer += 8 * weight * numbers / HOST if offload else roof.optimizer(numbers, 4 if lora else weight)
            talk += config.optim.epochs * _talk(machine, policy, trained, len(parts), weight, placement)
            saved = [memory.activation_bytes(policy.shape, m.tokens, checkpointing=checkpointing) for m in parts]
            most = max((most, *saved))
            logits = max((logits, *(memory.logit_bytes(policy.shape, m.scored) for m in parts)))
        refresh += roof.refresh(policy.shape.parameters, weight)
        if sharded:
            talk += machine.all_gather(weight * policy.shape.parameters)
    tokens = times * sum(
        a.length
        for name, calls in work.calls.items()
        if name.removesuffix("@start") in shapes
        for call in calls
        for a in call
    )
    seconds = StepSeconds(
        prefill=decoding.prefill,
        decode=decoding.decode,
        update=update,
        optimizer=optimizer,
        refresh=refresh,
        communication=talk,
        gather=0.0 if ranks == 1 else tokens * (machine.gather + TRAVELS / machine.network),
        host=times * work.host,
    )
    return seconds, _memory(held, config, placement, ranks, decoding, most, logits)


def _talk(machine: Machine, policy: Held, trained: float, micro: int, weight: int, placement: Placement) -> float:
    """Seconds of one update's communication."""
    if placement not in (Placement.FSDP2, Placement.OFFLOAD):
        return machine.all_reduce(trained * (4 if placement is Placement.LORA else weight))
    numbers = policy.shape.parameters
    # a block's weights are gathered forward and backward in bfloat16, its gradients summed in float32, in every micro-batch
    ring = 2 * machine.all_gather(memory.BFLOAT16 * numbers) + machine.all_gather(memory.FLOAT32 * numbers)
    bus = 0.0
    if placement is Placement.OFFLOAD:
        bus = 3 * memory.FLOAT32 * numbers / machine.ranks / PCIE
    return micro * (ring + bus)


def _arena(shape: Shape, batch: Batch) -> float:
    rows, columns = rounded(batch.rows, ROWS), rounded(batch.width + batch.new, COLUMNS)
    return memory.cache_bytes(shape, rows, columns, memory.BFLOAT16)


def _sampling(shape: Shape, batch: Batch) -> float:
    prompts = memory.cache_bytes(shape, batch.prompts, batch.width, memory.BFLOAT16)
    return prompts + memory.sampling_bytes(shape, batch.rows)


def together(held: Mapping[str, Held], config: RunConfig, machine: Machine, placement: Placement) -> int:
    """Tokens of one decode batch: the recipe's, or by the rule that training goes by."""
    if config.rollout.decode_tokens != "auto":
        return config.rollout.decode_tokens
    own, weights, optimizer, decoders, gradients = _standing(held, config, machine.ranks, placement)
    cached = [h.shape.cached for h in held.values()]
    return decode_budget(
        total=machine.card.memory,
        free=machine.card.memory - weights - decoders - _references(held, config, placement),
        coming=optimizer + gradients,
        token=memory.BFLOAT16
        * (sum(cached) * (2 if config.rollout.removal == "frozen" else 1) if own else max(cached)),
    )


def _own_decoders(config: RunConfig, placement: Placement) -> bool:
    """Whether each policy has a decoder of its own: adapters share one, unless they are changed while they speak."""
    return placement is not Placement.LORA or config.trainer.async_depth > 0


def _standing(
    held: Mapping[str, Held], config: RunConfig, ranks: int, placement: Placement
) -> tuple[bool, float, float, float, float]:
    """Whether each policy has a decoder of its own, and `memory.standing`."""
    own = _own_decoders(config, placement)
    found = memory.standing(
        held,
        placement,
        ranks,
        weight_bytes=BYTES[config.model.weights],
        decoder_bytes=BYTES[config.model.decode],
        copies=config.model.engine != "transformers",
        own_decoders=own,
    )
    return own, *found


def _references(held: Mapping[str, Held], config: RunConfig, placement: Placement) -> float:
    """Bytes of the frozen models of a KL term and of removal by frozen, with the latter's decoders."""
    weight, lora = BYTES[config.model.weights], placement is Placement.LORA
    trained = sum(h.shape.parameters for h in held.values() if h.trained)
    found = 0.0 if lora or config.loss.kl == "none" else float(weight * trained)
    if config.rollout.removal == "frozen":
        copies = sum(h.shape.parameters for h in held.values())
        decoders = BYTES[config.model.decode] * copies if _own_decoders(config, placement) else 0
        found += (0 if lora else weight) * copies + decoders
    return found


def _memory(
    held: Mapping[str, Held],
    config: RunConfig,
    placement: Placement,
    ranks: int,
    decoding: Decoding,
    activations: float,
    logits: float,
) -> Memory:
    own, weights, optimizer, decoders, gradients = _standing(held, config, ranks, placement)
    weight, trained = BYTES[config.model.weights], [h.shape for h in held.values() if h.trained]
    kept = max(
        memory.copied_bytes(
            s, checkpointing=config.model.gradient_checkpointing, compute=memory.BFLOAT16, weight_bytes=weight
        )
        for s in trained
    )
    if placement in (Placement.FSDP2, Placement.OFFLOAD):
        # the blocks in use: embedding and head stay gathered, and one layer with its gradients
        kept = max(memory.BFLOAT16 * 2 * s.embedding + 6 * s.layer_parameters for s in trained)
    return Memory(
        weights=weights,
        optimizer=optimizer,
        decoders=decoders,
        references=_references(held, config, placement),
        cache=sum(decoding.caches.values()) if own else max(decoding.caches.values(), default=0.0),
        sampling=decoding.sampling,
        gradients=gradients,
        copies=kept,
        activations=activations,
        logits=logits,
    )
