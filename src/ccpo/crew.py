"""The crew: a team's policies loaded, with the engines and voices they speak through and the learner that updates them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ccpo.build import Setup, is_remote
from ccpo.comm import Comm
from ccpo.config import RunConfig
from ccpo.engines import make_engine
from ccpo.engines.adapters import AdapterEngine, SharedDecoder
from ccpo.engines.budget import decode_budget, without_room
from ccpo.engines.native import NativeEngine
from ccpo.engines.sharded import FirstAlone, ShardedEngine
from ccpo.engines.vllm import Hosts, VllmSettings, check_installed, check_launched
from ccpo.engines.vllm_server import ServerHost
from ccpo.errors import UserError
from ccpo.families import compute_dtype, unsupported
from ccpo.learner import Learner, Policy, PolicySpec, freeze_copy, load_policies
from ccpo.learner.optim import STATES
from ccpo.learner.sharding import shard
from ccpo.remotes import Remotes
from ccpo.rollout import Voice

BEHIND_CAP = 2.0  # of the importance weights of rollouts that are an update behind
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Crew:
    """Policies by name, the voice of each agent, the frozen voices of removal by ``frozen``, and the learner (None where only evaluating).
    ``comm``: the ranks that decode and learn together; all begin with rank 0's weights. ``beside``: the same ranks, as those who speak while
    others learn hear them (else ``comm``). Agents behind endpoints have a voice and no policy."""

    def __init__(
        self,
        setup: Setup,
        paths: Mapping[str, str],
        *,
        train: bool = True,
        comm: Comm | None = None,
        beside: Comm | None = None,
    ) -> None:
        config = setup.config
        self.setup, self.comm = setup, comm or Comm()
        self.beside = beside or self.comm
        self.device = pick_device(config)
        self.remotes = self.comm.together(lambda: Remotes(config, setup.team.agent_names, self.comm))
        self._readers = self.remotes.readers()
        specs = policy_specs(setup, paths)
        check_sharding(config)
        model = config.model
        self.policies: dict[str, Policy] = self.comm.together(
            lambda: load_policies(
                specs,
                sharing=model.sharing,
                device=self.device,
                weights=DTYPES[model.weights],
                attention=model.attention,
                lora=model.lora.model_dump(),
                gradient_checkpointing=model.gradient_checkpointing and train,
                trust_remote_code=model.trust_remote_code,
            )
        )
        self.hosts = self._hosts(len(specs)) if model.engine == "vllm" else None
        for policy in self.policies.values():
            self.comm.copy([p.detach() for p in policy.model.parameters()])
        if model.shard and self.comm.size > 1 and train:
            for policy in self.policies.values():
                if (why := unsupported(policy.model)) is not None:
                    raise UserError(f"model.shard: policy {policy.name!r} cannot be decoded in shards: {why}")
                shard(policy.model, compute=DTYPES[model.compute] or compute_dtype(self.device), offload=model.offload)
        self._decoders: dict[int, SharedDecoder] = {}
        self._natives: list[NativeEngine] = []
        self.engines = {name: self._engine(policy) for name, policy in self.policies.items()}
        self._loaded = {name: policy.version for name, policy in self.policies.items()}
        self.frozen_voices: dict[str, Voice] = self._frozen() if config.rollout.removal == "frozen" and train else {}
        self.learner: Learner | None = make_learner(config, self.policies, self.comm) if train else None
        if config.rollout.decode_tokens == "auto" and self.device.type == "cuda" and self._natives:
            self._share_out(*torch.cuda.mem_get_info(self.device))

    def _engine(self, policy: Policy) -> Any:
        config = self.setup.config
        if self.hosts is not None:
            engine = self.hosts.engine(policy.model, policy.tokenizer, policy.adapter)
            shares = FirstAlone if config.model.vllm.url is not None else ShardedEngine
            return engine if self.comm.size == 1 else shares(engine, self.comm)
        if config.trainer.async_depth and (why := unsupported(policy.model, policy.adapter)) is not None:
            raise UserError(
                f"trainer.async_depth: policy {policy.name!r} would be changed while it speaks, for the native engine, which has a copy of the "
                f"weights, cannot run it: {why}; set trainer.async_depth: 0"
            )
        engine = self._decoder(policy)
        return engine if self.comm.size == 1 else ShardedEngine(engine, self.beside)

    def _hosts(self, policies: int) -> Hosts:
        """The vLLM instances that the policies will speak through. Of several ranks each has its own on its GPU; a server, the first alone
        asks."""
        config, comm = self.setup.config, self.comm
        if comm.size > 1 and config.model.vllm.url is None and self.device.type == "cuda":
            comm.together(lambda: check_launched(torch.cuda.device_count()))
        return _hosts(config, self.setup, policies, comm.size)

    def _decoder(self, policy: Policy) -> Any:
        """Its engine on this rank. Adapters of one base share one decoder, unless they speak while they are changed."""
        config = self.setup.config
        shared = self._decoders.get(id(policy.model))
        if policy.adapter is not None and shared is not None:
            return AdapterEngine(shared, policy.adapter)
        engine = make_engine(
            policy.model,
            policy.tokenizer,
            kind=config.model.engine,
            dtype=DTYPES[config.model.decode],
            adapter=policy.adapter,
            max_batch_tokens=without_room(config.rollout.decode_tokens),
        )
        if isinstance(engine, NativeEngine):
            self._natives.append(engine)
        if policy.adapter is None or config.trainer.async_depth or not isinstance(engine, NativeEngine):
            return engine
        self._decoders[id(policy.model)] = SharedDecoder(engine)
        return AdapterEngine(self._decoders[id(policy.model)], policy.adapter)

    def _share_out(self, free: int, total: int) -> None:
        """Give the decoders' caches what training will leave of a GPU's memory, all of them as many tokens."""
        sizes = [
            sum(_held(p, self.device) for p in policy.parameters().values()) if policy.trainable else 0
            for policy in self.policies.values()
        ]
        coming = STATES * sum(sizes) + max(sizes) if self.learner else 0
        tokens = decode_budget(
            total=total, free=free, coming=coming, token=sum(engine.token_bytes for engine in self._natives)
        )
        for engine in self._natives:
            engine.max_batch_tokens = tokens

    def _frozen(self) -> dict[str, Voice]:
        """The policies as they are at the start, under names of their own."""
        voices = {a: v for a, v in self.voices().items() if a not in self.remotes.engines}
        engines = {name: self._engine(freeze_copy(policy)) for name, policy in self.policies.items()}
        frozen = {a: replace(v, policy=f"{v.policy}@start", engine=engines[v.policy]) for a, v in voices.items()}
        return {**self.voices(), **frozen}  # an endpoint is what it was at the start

    def voices(self) -> dict[str, Voice]:
        """The voice of each agent, at its policy's present version."""
        voices = {}
        for agent, name in self.setup.policy_of.items():
            if agent in self.remotes.engines:
                voices[agent] = Voice(
                    agent=agent,
                    policy=name,
                    engine=self.remotes.voices[agent],
                    tokenizer=self._readers[agent],
                    sampling=self.setup.samplings[agent],
                )
                continue
            policy = self.policies[name]
            voices[agent] = Voice(
                agent=agent,
                policy=name,
                engine=self.engines[name],
                tokenizer=policy.tokenizer,
                sampling=self.setup.samplings[agent],
                version=policy.version,
            )
        return voices

    def rest(self) -> None:
        """Nobody speaks until the next refresh: what decoding holds of the device's memory goes to the learner."""
        if self.hosts is not None:
            self.hosts.rest()

    def refresh(self, *, everything: bool = False) -> None:
        """Hand the weights that an update changed to their engines."""
        for name, policy in self.policies.items():
            if everything or policy.version != self._loaded[name]:
                self.engines[name].refresh()
                self._loaded[name] = policy.version


def _held(parameter: Any, device: torch.device) -> int:
    """Bytes of a weight, or of this rank's shard of it, on the device."""
    own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return own.nbytes if own.device.type == device.type else 0


def pick_device(config: RunConfig) -> torch.device:
    wanted = config.run.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device is 'cuda', but torch sees no CUDA device here; set run.device: auto, or install a CUDA build of torch"
        )
    device = torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")
    if config.model.engine == "vllm":
        check_installed(device.type)
    return device


def _hosts(config: RunConfig, setup: Setup, policies: int, processes: int) -> Hosts:
    """Under removal by ``frozen`` each adapter has a copy as it was at the start."""
    model, sizes = config.model, [s.max_tokens for s in setup.samplings.values()]
    lora = model.sharing == "lora"
    settings = VllmSettings(
        memory=model.vllm.memory,
        sleep=model.vllm.sleep,
        eager=model.vllm.eager,
        length=config.rollout.max_prompt_tokens + max([*sizes, getattr(setup.rule, "max_tokens", 0)]),
        dtype="bfloat16" if model.decode == "auto" else model.decode,
        adapters=policies * (2 if config.rollout.removal == "frozen" else 1) if lora else 0,
        rank=model.lora.rank if lora else 0,
        processes=processes,
        trust_remote_code=model.trust_remote_code,
    )
    if model.vllm.url is None:
        return Hosts(settings)
    server = model.vllm
    return Hosts(
        settings,
        partial(ServerHost, url=server.url, port=server.port, concurrency=server.concurrency, timeout=server.timeout),
    )


def check_sharding(config: RunConfig) -> None:
    """Raises UserError for what does not go with weights in shards."""
    if config.model.offload and not config.model.shard:
        raise UserError("model.offload goes with model.shard: true; set both")
    if not config.model.shard:
        return
    wrong = {
        "model.sharing: lora (its base is frozen and small beside an optimiser)": config.model.sharing == "lora",
        "model.engine: transformers": config.model.engine == "transformers",
        "model.engine: vllm (it is handed whole weights)": config.model.engine == "vllm",
        "rollout.removal: frozen": config.rollout.removal == "frozen",
        "loss.kl (its reference is a whole copy)": config.loss.kl != "none",
    }
    for what, there in wrong.items():
        if there:
            raise UserError(f"model.shard does not go with {what}; drop one of them")


def policy_specs(setup: Setup, paths: Mapping[str, str]) -> list[PolicySpec]:
    """What to load: one spec a policy, with the agents that speak with it; none for an agent behind an endpoint."""
    config = setup.config
    specs = []
    local = {a: policy for a, policy in setup.policy_of.items() if not is_remote(config, a)}
    for name in dict.fromkeys(local.values()):
        agents = tuple(a for a, policy in local.items() if policy == name)
        own = {a: config.agents[a] for a in agents if a in config.agents}
        rates = {s.lr for s in own.values() if s.lr is not None}
        if len({paths[a] for a in agents}) > 1 or len(rates) > 1:
            raise UserError(
                f"agents {', '.join(agents)} speak with one policy, so they cannot have different models or learning rates; "
                "set model.sharing: separate, or give them the same"
            )
        frozen = [a in own and own[a].frozen for a in agents]
        if any(frozen) and not all(frozen):
            still = ", ".join(a for a, f in zip(agents, frozen, strict=True) if f)
            raise UserError(
                f"agents.{still}.frozen: it shares its weights with agents that are trained; set model.sharing: separate or lora"
            )
        specs.append(
            PolicySpec(
                name=name,
                agents=agents,
                model_path=paths[agents[0]],
                lr=rates.pop() if rates else config.optim.lr,
                frozen=all(frozen),
            )
        )
    return specs


def make_learner(config: RunConfig, policies: Mapping[str, Policy], comm: Comm | None = None) -> Learner:
    optim = config.optim
    return Learner(
        policies,
        comm=comm,
        **objective_of(config),
        total_steps=config.trainer.steps,
        compute=DTYPES[config.model.compute],
        **optim.model_dump(exclude={"lr", "minibatches"}),
    )


def objective_of(config: RunConfig) -> dict[str, Any]:
    """The settings of all that an update minimises."""
    loss = config.loss
    return {
        **policy_loss(config),
        "kl": loss.kl,
        "kl_coef": loss.kl_coef,
        "entropy_coef": loss.entropy_coef,
        "importance_cap": importance_cap(config),
        "old_logprobs": loss.old_logprobs,
    }


def importance_cap(config: RunConfig) -> float | None:
    """The recipe's; where rollouts are an update behind, and the ratio is not the engine's own, there is always one."""
    behind = config.trainer.async_depth and config.loss.old_logprobs != "engine"
    return config.loss.importance_cap or (BEHIND_CAP if behind else None)


def policy_loss(config: RunConfig) -> dict[str, Any]:
    """The settings of the recipe's policy loss and of its mean, without KL and entropy."""
    loss = config.loss
    return {
        "loss": loss.kind,
        "clip_low": loss.clip_low,
        "clip_high": loss.clip_high,
        "dual_clip": loss.dual_clip,
        "aggregate": loss.aggregate,
        "constant": loss.constant,
        "ratio_over": loss.ratio_over,
    }
