"""Policies: the weights that one or more agents speak with.

======== ================================================ ==============================================
sharing  weights                                          an agent that is frozen
======== ================================================ ==============================================
separate a model for each policy, equal paths or not      a model without gradients
shared   one model for all agents                         (all agents or none)
lora     one frozen base, an adapter for each policy      an adapter that no optimiser holds
======== ================================================ ==============================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ccpo.errors import UserError, nearest
from ccpo.learner import lora as adapters
from ccpo.learner.loading import absolute, adapter_base, check_device, load_model, load_tokenizer

SHARINGS = ("separate", "shared", "lora")
START = "@start"  # no agent's name has an @


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """What to load: the policy's name, the agents that speak with it, a Hugging Face name or folder (with LoRA also the
    folder of an adapter), its learning rate, and whether it stays as it is."""

    name: str
    agents: tuple[str, ...]
    model_path: str
    lr: float = 1e-6
    frozen: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Policy:
    """A policy that is loaded. ``model`` is a live transformers model or PeftModel (then ``adapter`` is its own), in
    eval mode; ``version`` counts the optimiser steps that changed it."""

    name: str
    agents: tuple[str, ...]
    model: Any
    tokenizer: Any
    adapter: str | None = None
    trainable: bool = True
    lr: float = 1e-6
    version: int = 0

    def activate(self) -> None:
        """Make the model speak with this policy's adapter; nothing to do where it has none."""
        if self.adapter is not None:
            self.model.set_adapter(self.adapter, inference_mode=not self.trainable)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights that are this policy's own, by name: the adapter's, or all of the model's (tied ones once)."""
        if self.adapter is not None:
            return adapters.adapter_parameters(self.model, self.adapter)
        return dict(self.model.named_parameters())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_policies(
    specs: Sequence[PolicySpec],
    *,
    sharing: str = "separate",
    device: torch.device | str = "cpu",
    weights: torch.dtype | None = None,
    attention: str = "auto",
    lora: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Policy]:
    """The policies of ``specs``, by name and in their order.

    ``weights``: dtype of the weights that are trained; None is float32, in which an update smaller than a bfloat16 step
    is not lost. ``lora``: ``rank``, ``alpha``, ``dropout``, ``targets`` of fresh adapters. Raises UserError for what
    cannot be loaded (:mod:`ccpo.learner.loading`), an unknown sharing, and models of their own where weights are
    shared.
    """
    device = torch.device(device)
    check_device(device)
    _check(specs, sharing)
    options = {
        "device": device,
        "dtype": weights or torch.float32,
        "attention": attention,
        "gradient_checkpointing": gradient_checkpointing,
        "trust_remote_code": trust_remote_code,
    }
    if sharing == "lora":
        return _with_adapters(specs, dict(lora or {}), options)
    return {spec.name: _whole(spec, options) for spec in specs}


def freeze_copy(policy: Policy) -> Policy:
    """The policy as it is now, as a copy that nothing changes: of the whole model, or of its adapter on the same base.

    It is named ``NAME@start``; one policy has one such copy.
    """
    name = policy.name + START
    model, adapter = policy.model, policy.adapter
    if adapter is None:
        model = deepcopy(model).requires_grad_(False)
        model.zero_grad(set_to_none=True)
    else:
        adapter = adapter + START
        adapters.copy_adapter(model, policy.adapter, adapter)
    return Policy(
        name=name,
        agents=policy.agents,
        model=model,
        tokenizer=policy.tokenizer,
        adapter=adapter,
        trainable=False,
        lr=policy.lr,
        version=policy.version,
    )


class Reference:
    """What a policy must not stray from: a frozen copy of it, or with an adapter the base that the adapter sits on."""

    def __init__(self, policy: Policy) -> None:
        self._model = None if policy.adapter is not None else freeze_copy(policy).model
        self._policy = policy

    @contextmanager
    def model(self) -> Iterator[Any]:
        """The reference model; a PeftModel's adapters are switched off within the block."""
        if self._model is not None:
            yield self._model
        else:
            with self._policy.model.disable_adapter():
                yield self._policy.model


def _check(specs: Sequence[PolicySpec], sharing: str) -> None:
    if sharing not in SHARINGS:
        raise UserError(
            f"model.sharing is {sharing!r}; it is one of {', '.join(SHARINGS)}.{nearest(sharing, SHARINGS)}"
        )
    names = [spec.name for spec in specs]
    if not names or len(set(names)) < len(names):
        raise UserError(f"policies need names of their own; got {', '.join(names) or 'no policy at all'}.")
    paths = {spec.name: _base(spec) for spec in specs}
    if sharing == "shared" and len(specs) > 1:
        raise UserError(
            f"model.sharing is 'shared', but there are {len(specs)} policies ({', '.join(names)}); set model.sharing: "
            "separate."
        )
    if sharing == "lora" and len(set(paths.values())) > 1:
        odd = next(n for n in names if paths[n] != paths[names[0]])
        raise UserError(
            f"agents.{odd}.model is {paths[odd]!r}, but with model.sharing: lora all agents sit on one base, "
            f"{paths[names[0]]!r}; set model.sharing: separate, or drop the override."
        )
    if sharing != "lora":
        for spec in specs:
            if adapter_base(spec.model_path) is not None:
                raise UserError(
                    f"{spec.model_path!r} is a LoRA adapter, not a whole model; set model.sharing: lora, or merge it "
                    "into its base first (PeftModel.merge_and_unload)."
                )


def _base(spec: PolicySpec) -> str:
    return absolute(adapter_base(spec.model_path) or spec.model_path)


def _whole(spec: PolicySpec, options: Mapping[str, Any]) -> Policy:
    tokenizer = load_tokenizer(spec.model_path, trust_remote_code=options["trust_remote_code"])
    model = load_model(spec.model_path, **options)
    model.requires_grad_(not spec.frozen)
    return Policy(
        name=spec.name, agents=spec.agents, model=model, tokenizer=tokenizer, trainable=not spec.frozen, lr=spec.lr
    )


def _with_adapters(specs: Sequence[PolicySpec], lora: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Policy]:
    base_path = _base(specs[0])
    tokenizer = load_tokenizer(base_path, trust_remote_code=options["trust_remote_code"])
    base = load_model(base_path, **options)
    base.requires_grad_(False)
    settings = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"} | lora
    saved = {spec.name: adapter_base(spec.model_path) is not None for spec in specs}
    configs = {
        spec.name: adapters.read_config(spec.model_path)
        if saved[spec.name]
        else adapters.lora_config(base_path, **settings)
        for spec in specs
    }
    for config in configs.values():
        config.base_model_name_or_path = base_path
        config.inference_mode = False
    model = adapters.wrap(base, configs)
    policies = {}
    for spec in specs:
        if saved[spec.name]:
            adapters.load_adapter(model, spec.name, Path(spec.model_path).expanduser())
        policies[spec.name] = Policy(
            name=spec.name,
            agents=spec.agents,
            model=model,
            tokenizer=tokenizer,
            adapter=spec.name,
            trainable=not spec.frozen,
            lr=spec.lr,
        )
    policies[specs[0].name].activate()
    return policies
