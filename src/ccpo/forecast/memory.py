"""Bytes on one GPU. Formulas of ``docs/plan.md``; all arguments are numbers and shapes, all results bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from ccpo.forecast.shapes import Shape
from ccpo.learner.logprobs import CHUNK, LOGITS
from ccpo.learner.optim import STATES

FLOAT32, BFLOAT16 = 4, 2


class Placement(StrEnum):
    """How a team's weights lie on the GPUs."""

    DDP = "ddp"  # whole on each
    FSDP2 = "fsdp2"  # model.shard: true
    OFFLOAD = "offload"  # and model.offload: true, the shards in the CPU's memory
    LORA = "lora"  # model.sharing: lora, one base and an adapter for each policy


SETTINGS = {
    Placement.DDP: "model.shard: false",
    Placement.FSDP2: "model.shard: true",
    Placement.OFFLOAD: "model.shard: true, model.offload: true",
    Placement.LORA: "model.sharing: lora",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A policy's weights: its shape, whether it is trained, numbers of its adapter (0: it has none)."""

    shape: Shape
    trained: bool
    adapter: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one GPU. What stays: ``weights``, ``optimizer``, ``decoders`` (the engines' copies), ``references`` (of a KL term or of removal by
    frozen) and ``cache``, the arena of each engine, which it keeps. What comes and goes: ``sampling`` (prompts' own caches and
    the logits of a step); ``gradients``, ``copies`` (weights in the dtype of the products), ``activations`` and ``logits`` in an update."""

    weights: float
    optimizer: float
    decoders: float
    references: float
    cache: float
    sampling: float
    gradients: float
    copies: float
    activations: float
    logits: float

    @property
    def stays(self) -> float:
        return self.weights + self.optimizer + self.decoders + self.references + self.cache

    @property
    def decoding(self) -> float:
        return self.stays + self.sampling

    @property
    def updating(self) -> float:
        return self.stays + self.gradients + self.copies + self.activations + self.logits

    @property
    def peak(self) -> float:
        """The most at any time: decoding and update do not overlap."""
        return max(self.decoding, self.updating)


def standing(
    policies: Mapping[str, Held],
    placement: Placement,
    ranks: int,
    *,
    weight_bytes: int,
    decoder_bytes: int,
    copies: bool,
    own_decoders: bool = False,
) -> tuple[float, float, float, float]:
    """``(weights, optimizer, decoders, largest gradient)`` on one of ``ranks`` GPUs.

    Weights and AdamW's two states are ``weight_bytes`` a number each; a policy's gradient is freed before the next policy's begins, so that
    only the largest counts. With adapters the base stands once, and so does the decoder's copy of it, unless each has a decoder of its own
    (``own_decoders``: `trainer.async_depth`). ``copies``: whether decoders hold copies at all.
    """
    share = 1 / ranks if placement is Placement.FSDP2 else 0.0 if placement is Placement.OFFLOAD else 1.0
    if placement is Placement.LORA:
        base = max((held.shape for held in policies.values()), key=lambda s: s.parameters)
        adapters = {name: FLOAT32 * held.adapter for name, held in policies.items()}
        trained = [adapters[name] for name, held in policies.items() if held.trained]
        weights = weight_bytes * base.parameters + sum(adapters.values())
        optimizer, gradient = STATES * sum(trained), max(trained, default=0)
    else:
        sizes = {name: weight_bytes * held.shape.parameters for name, held in policies.items()}
        trained = [sizes[name] for name, held in policies.items() if held.trained]
        weights, optimizer = share * sum(sizes.values()), share * STATES * sum(trained)
        gradient = share * max(trained, default=0)
    decoders = decoder_bytes * sum(held.shape.parameters for held in policies.values()) if copies else 0
    if placement is Placement.LORA and not own_decoders and copies:
        decoders = decoder_bytes * base.parameters
    return weights, optimizer, float(decoders), gradient


def cache_bytes(shape: Shape, rows: int, columns: int, element: int) -> float:
    """Keys and values of ``rows`` texts of at most ``columns`` tokens."""
    return float(rows * columns * shape.cached * element)


def sampling_bytes(shape: Shape, rows: int) -> float:
    """Logits of one step, once in bfloat16 and three times in float32 while a token is drawn."""
    return float(rows * shape.vocab * (BFLOAT16 + 3 * FLOAT32))


def activation_bytes(shape: Shape, tokens: int, *, checkpointing: bool, compute: int = BFLOAT16) -> float:
    """What the backward pass of ``tokens`` needs, as `ccpo.learner.forward` saves it.

    A layer and token: the residual stream in float32 at both norms and the normed streams, ``2 (4 + c) hidden``; queries, keys and values,
    and the mixed heads twice, ``c (3 heads + 2 kv_heads) head_dim``; gate and up, their activation and their product, ``4 c mlp``. With
    ``checkpointing`` a layer keeps its two inputs, ``(4 + c) hidden``, and one layer at a time the rest.
    """
    heads = (3 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layer = 2 * (FLOAT32 + compute) * shape.hidden + compute * (heads + 4 * shape.mlp)
    if checkpointing:
        return float(tokens * (shape.layers * (FLOAT32 + compute) * shape.hidden + layer))
    return float(tokens * shape.layers * layer)


def copied_bytes(shape: Shape, *, checkpointing: bool, compute: int, weight_bytes: int) -> float:
    """Matrices in the dtype of the products, which `ccpo.learner.forward` keeps for the backward pass where that is smaller: of all layers, or
    of one where layers are run again."""
    if compute >= weight_bytes:
        return 0.0
    layers = 1 if checkpointing else shape.layers
    return float(compute * (layers * shape.layer_weights + shape.embedding))


def logit_bytes(shape: Shape, scored: int, device: str = "cuda", compute: int = BFLOAT16) -> float:
    """Logits of the scored tokens and their gradient, of at most ``LOGITS`` at a time, and two chunks in float32."""
    kept = min(scored * shape.vocab, LOGITS[device])
    return float(2 * compute * kept + 2 * FLOAT32 * min(kept, CHUNK[device]))


def lora_ratio(
    shape: Shape, agents: int, rank: int = 16, *, own_decoders: bool = False, cache: float = 0.0, room: float = 0.0
) -> float:
    """How many times the memory of one agent K ``agents`` need as adapters of ``rank`` on one base, float32 with AdamW: what stays, the
    largest gradient, ``cache`` bytes for each decoder and ``room`` bytes once (activations). ``own_decoders``: as if each adapter were merged
    into a decoder of its own."""
    adapter = shape.adapter(rank)

    def held(count: int) -> float:
        policies = {str(i): Held(shape=shape, trained=True, adapter=adapter) for i in range(count)}
        stays = standing(
            policies,
            Placement.LORA,
            1,
            weight_bytes=FLOAT32,
            decoder_bytes=BFLOAT16,
            copies=True,
            own_decoders=own_decoders,
        )
        return sum(stays) + (count if own_decoders else 1) * cache + room

    return held(agents) / held(1)
