"""What a recipe may say: :class:`RunConfig` and its sections, read from YAML and ``--set`` overrides.

Every section refuses unknown keys. A section that names a ``kind`` (``team``, ``task``, ``credit``) is a :class:`Part`:
its other keys are the arguments of the thing it names, and are checked against that thing's own signature by
:mod:`ccpo.build`, so that a new rule, team or task needs no second declaration here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ccpo.errors import UserError, nearest
from ccpo.explain import explain
from ccpo.plain_yaml import parse_yaml, read_mapping
from ccpo.sections import RemoteSection, Section, VllmSection

Share = Annotated[float, Field(ge=0, le=1)]
UNLIMITED = 1_000_000  # steps of a run that only its budget of tokens ends


class Part(BaseModel):
    """A thing named by ``kind`` (a built-in name, or ``module:attribute`` of your own) with its arguments beside it."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())
    kind: str

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class RunSection(Section):
    name: str = "run"
    dir: str | None = Field(None, description="run folder; default runs/NAME")
    seed: int = Field(0, ge=0, lt=2**31)
    threads: int | None = Field(None, ge=1, description="torch threads; default: torch's own choice")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    overwrite: bool = Field(False, description="delete a run folder that exists")

    @property
    def folder(self) -> str:
        return self.dir or f"runs/{self.name}"


class LoraSection(Section):
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"


class ModelSection(Section):
    path: str = Field(
        "bootstrap", description="Hugging Face name or folder, or 'bootstrap' for a tiny model of our own"
    )
    sharing: Literal["separate", "shared", "lora"] = "separate"
    lora: LoraSection = LoraSection()
    weights: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the trained weights")
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of matrix products in the update"
    )
    engine: Literal["auto", "native", "transformers", "vllm"] = "auto"
    vllm: VllmSection = VllmSection()
    decode: Literal["auto", "float32", "bfloat16"] = Field("auto", description="dtype of the decoder")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool = False
    shard: bool = Field(
        False, description="weights, gradients and optimiser state in shards over the processes (FSDP2)"
    )
    offload: bool = Field(False, description="with shard: keep the shards in the CPU's memory")
    trust_remote_code: bool = False


CONTEXT = 512  # tokens of the tiny base model, a character each


class BootstrapSection(Section):
    """The tiny base model that stands in for a pretrained one where there is none (``model.path: bootstrap``)."""

    hidden: int = Field(128, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(2, ge=1)
    mlp: int = Field(384, ge=8)
    steps: int = Field(1500, ge=1, description="the most supervised steps on correct demonstrations")
    learned: float = Field(0.02, gt=0, description="loss per token at which the skill counts as learned")
    cooldown: int = Field(80, ge=1, description="further steps from there, while the rate falls")
    noisy_steps: int = Field(150, ge=0, description="further steps on demonstrations of which some are wrong")
    noise: Share | dict[str, Share] = Field(0.6, description="share of wrong demonstrations, for all turns or per turn")
    solo: float = Field(0.25, ge=0, le=1, description="share of demonstrations that lack the upstream messages")
    ratings: bool = Field(False, description="whether it learns to rate plays too, for SEPO, by `credit.prompt`")
    rating_noise: Share = Field(0.1, description="share of demonstrated ratings that are drawn at random")
    batch: int = Field(128, ge=1)
    lr: float = Field(1e-3, gt=0)
    noisy_lr: float = Field(3e-4, gt=0)
    seed: int = 0
    cache: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> BootstrapSection:
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden is {self.hidden} and heads {self.heads}; hidden must be a multiple of twice the heads"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads} and kv_heads {self.kv_heads}; heads must be a multiple of kv_heads"
            )
        return self


class AgentSection(Section):
    """Overrides for one agent; what is absent comes from ``model``, ``optim`` and ``rollout``."""

    model: str | None = None
    lr: float | None = Field(None, gt=0)
    frozen: bool = False
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    stop: list[str] | None = None
    remote: RemoteSection | None = Field(None, description="an endpoint that speaks for it, and is not trained")

    @model_validator(mode="before")
    @classmethod
    def _remote_is_frozen(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("remote") is None:
            return value
        for name in ("model", "lr"):
            if value.get(name) is not None:
                raise ValueError(
                    f"{name} is set, but an agent behind an endpoint (remote) has none; remove one of the two"
                )
        if value.get("frozen") is False:
            raise ValueError(
                "frozen is false, but an agent behind an endpoint (remote) cannot be trained; remove one of the two"
            )
        return {**value, "frozen": True}


class SamplingSection(Section):
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)


class RolloutSection(Section):
    prompts: int = Field(16, ge=1, description="P: problems a step")
    samples: int = Field(4, ge=1, description="N: joint rollouts a problem")
    branch: list[Annotated[int, Field(ge=1)]] | Literal["auto"] | None = Field(
        None,
        description="tree of rollouts: texts a context by level of the graph, [4, 2]; 'auto': from measured variances",
    )
    draws: int | None = Field(None, ge=1, description="M: counterfactual draws; default N a problem, or 1 a rollout")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    stop: list[str] = Field([])
    max_tokens: int = Field(256, ge=1)
    max_prompt_tokens: int = Field(4096, ge=1)
    max_message_tokens: int | None = Field(None, ge=1, description="cap on one message, by the reader's tokenizer")
    removal: Literal["drop", "blank", "placeholder", "frozen"] = "drop"
    placeholder: str = "(no message)"
    truncated: Literal["zero", "keep"] = Field("zero", description="reward of a rollout with a truncated turn")
    boxed_reward: dict[str, float] = Field({}, description="per agent, added to its credit when it writes \\boxed")
    cache: Literal["auto", "off", "always"] = Field(
        "auto",
        description="reuse counterfactual rewards while those who spoke are unchanged; 'always': across updates too",
    )
    decode_tokens: Annotated[int, Field(ge=256)] | Literal["auto"] = Field(
        "auto", description="tokens in the cache of one decode batch; 'auto': what a GPU has room for, 65536 on a CPU"
    )
    verify_seconds: float = Field(5.0, gt=0, description="time limit of one verdict")


class LossSection(Section):
    kind: Literal["ppo_clip", "gspo", "turn", "cispo", "reinforce++"] = "ppo_clip"
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    aggregate: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant", "trajectory-mean"] = (
        "token-mean"
    )
    constant: float | None = Field(None, gt=0, description="divisor of aggregate: constant")
    ratio_over: Literal["turn", "agent"] = Field("agent", description="what one sequence ratio spans")
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    kl_coef: float = Field(0.0, ge=0)
    entropy_coef: float = 0.0
    importance_cap: float | None = Field(
        None, gt=0, description="cap of the engine/learner importance weights; null: off"
    )
    old_logprobs: Literal["auto", "engine", "learner"] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> LossSection:
        if self.aggregate == "constant" and self.constant is None:
            raise ValueError("aggregate 'constant' needs loss.constant, the divisor (Dr. GRPO: the longest completion)")
        if self.kl == "none" and self.kl_coef > 0:
            raise ValueError("kl_coef is set but kl is 'none'; set loss.kl to k1, k2 or k3")
        return self


class OptimSection(Section):
    lr: float = Field(1e-6, gt=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(1, ge=1, description="optimiser updates an epoch; problems are split among them")
    microbatch_tokens: int = Field(16384, ge=64, description="tokens of one forward and backward pass")


class TrainerSection(Section):
    steps: int = Field(100, ge=0, description="the last step; with tokens and no steps: no limit but the tokens")
    tokens: int | None = Field(
        None, ge=1, description="budget of generated tokens; the step that reaches it is the last"
    )
    schedule: Literal["simultaneous", "alternating"] = "simultaneous"
    period: int = Field(10, ge=1, description="steps an agent is trained before the next has its turn")
    first: str | None = Field(None, description="the agent that an alternating schedule starts with")
    eval_every: int = Field(0, ge=0, description="0: before and after only")
    save_every: int = Field(50, ge=0, description="0: at the end only")
    keep_checkpoints: int = Field(2, ge=1)
    shuffle: bool = True
    async_depth: int = Field(
        0, ge=0, le=1, description="1: the next step's rollouts are played during this step's update, one update behind"
    )

    @model_validator(mode="before")
    @classmethod
    def _tokens_alone(cls, value: Any) -> Any:
        """A budget of tokens without a number of steps is not cut short by the default number."""
        if isinstance(value, Mapping) and value.get("tokens") is not None and "steps" not in value:
            return {**value, "steps": UNLIMITED}
        return value


class EvalSection(Section):
    tasks: dict[str, Part] = Field({}, description="named data sets; empty: the training task's held-out split")
    problems: int = Field(500, ge=1, description="problems of each data set")
    during: int = Field(200, ge=1, description="problems of each evaluation during training")
    every_tokens: int | None = Field(None, ge=1, description="evaluate during training every so many generated tokens")
    samples: int = Field(1, ge=1)
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    ablations: bool = True


class LogSection(Section):
    tensorboard: bool = True
    wandb: bool = False
    trackio: bool = False
    project: str = "ccpo"
    episodes: bool = True
    progress: bool = True


class RunConfig(Section):
    """A whole recipe."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    bootstrap: BootstrapSection = BootstrapSection()
    agents: dict[str, AgentSection] = Field({})
    team: Part = Part(kind="think_solve")
    task: Part | None = None
    eval: EvalSection = EvalSection()
    credit: Part = Part(kind="auto")
    advantage: Literal["auto", "grpo", "dr_grpo", "rloo", "maxrl", "reinforce++", "none"] = "auto"
    process: float = Field(0.0, ge=0, description="weight of the task's process rewards; 0: they are not asked for")
    rollout: RolloutSection = RolloutSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    trainer: TrainerSection = TrainerSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.optim.minibatches > self.rollout.prompts:
            raise ValueError(
                f"optim.minibatches is {self.optim.minibatches} but a step has only rollout.prompts = "
                f"{self.rollout.prompts} problems to split; lower it or raise rollout.prompts"
            )
        return self


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The :class:`RunConfig` of a recipe: a YAML file, the name of one that ships with the package, or a mapping.

    ``overrides`` are ``path.to.key=value`` strings, the value in YAML. Raises :class:`~ccpo.errors.UserError` that
    names the key, what was found, what is allowed and the nearest right name.
    """
    if isinstance(source, Mapping):
        data, where = _plain(source), "recipe"
    else:
        path = find_recipe(source)
        data, where = read_mapping(path, "a recipe is a mapping of sections (run, model, team, task, …)"), path.name
    for override in overrides:
        _apply(data, override)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, RunConfig, where, data)) from None


def shipped_recipes() -> dict[str, Path]:
    """The recipes inside the package, by name."""
    return {p.stem: p for p in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def find_recipe(source: str | Path) -> Path:
    """A recipe's file: the path itself, or the shipped recipe of that name (``demo``, ``recipes/demo.yaml``)."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    name = path.name.removesuffix(".yaml").removesuffix(".yml")  # not path.stem: names have dots
    if name in shipped and str(path.parent) in (".", "recipes"):
        return shipped[name]
    raise UserError(
        f"No recipe at {str(source)!r}: neither a file nor a shipped recipe ({', '.join(shipped)})."
        f"{nearest(name, shipped)}"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _apply(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise UserError(f"--set {override!r}: expected path.to.key=value, for example trainer.steps=50")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        value = text
    *parents, key = path.strip().split(".")
    node = data
    for depth, parent in enumerate(parents, start=1):
        child = node.get(parent)
        if isinstance(child, str) and _is_part(parents[:depth]):
            child = {"kind": child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise UserError(f"--set {override!r}: {parent!r} holds {child!r}, which has no key {key!r}")
        node[parent] = child
        node = child
    if key == "kind" and _is_part(parents) and node.get("kind") != value:
        node.clear()  # another kind has other arguments: those of the old one do not carry over
    node[key] = value


def _is_part(path: Sequence[str]) -> bool:
    return path in (["team"], ["task"], ["credit"]) or (path[:2] == ["eval", "tasks"] and len(path) == 3)
