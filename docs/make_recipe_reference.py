"""Writes ``docs/recipes.md``: every key of a recipe with its type, default and meaning, read from the code.

python docs/make_recipe_reference.py
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from ccpo.config import Part, RunConfig, shipped_recipes
from ccpo.credit import RULES
from ccpo.sections import Section
from ccpo.tasks import TASKS
from ccpo.teams import TEAMS

TARGET = Path(__file__).with_name("recipes.md")

MEANINGS = {
    "run": "where the run goes and what makes it repeatable",
    "model": "the weights that the agents speak with, and in what precision",
    "bootstrap": "the tiny base model that stands in for a pretrained one (`model.path: bootstrap`)",
    "agents": (
        "overrides by agent; what is absent comes from `model`, `optim` and `rollout`. With `remote`, an endpoint speaks for it: "
        "[scaling](scaling.md#remote-agents)"
    ),
    "team": "who speaks, in what order, and how the answer is made: [teams](teams.md)",
    "task": "problems and their verifier: [data](data.md)",
    "eval": "how the team is judged before, during and after training",
    "credit": "what each agent is paid: [rules](rules.md)",
    "advantage": "from credit to advantage: [rules](rules.md#estimators)",
    "process": "weight of the task's process rewards, which join the credit of the turns that it judges: [rules](rules.md#process-rewards)",
    "rollout": "what is sampled in a step, and how",
    "loss": "from advantage to a number to minimise: [rules](rules.md#losses)",
    "optim": "AdamW and its learning rate",
    "trainer": "how long, who is trained when, and what is kept",
    "log": "where metrics and episodes go",
    "run.name": "name of the run, shown in tables and by loggers",
    "run.seed": "of everything that is random but the base model",
    "run.device": "`auto` takes CUDA where torch sees it",
    "model.sharing": "a model for each policy, one for all agents, or a LoRA adapter for each policy on one base",
    "model.lora.rank": "of the adapters of `sharing: lora`",
    "model.lora.alpha": "scale: the adapter counts `alpha / rank`",
    "model.lora.dropout": "within the adapter, in the update only",
    "model.lora.targets": "the layers that get an adapter",
    "model.engine": "what decodes; `auto`: native for the Qwen2, Qwen3 and Llama families, else transformers; `vllm`: [scaling](scaling.md#vllm)",
    "model.attention": "`auto`: eager on a CPU, the model's best elsewhere",
    "model.shard": "with several processes: weights, gradients and optimiser state in shards over them (FSDP2)",
    "model.offload": "with `shard`: keep the shards in the CPU's memory",
    "model.gradient_checkpointing": "recompute activations in the backward pass: less memory, more time",
    "model.trust_remote_code": "run code that comes with the model; only for sources that you trust",
    "bootstrap.hidden": "width of the model",
    "bootstrap.layers": "number of layers",
    "bootstrap.heads": "attention heads",
    "bootstrap.kv_heads": "key-value heads",
    "bootstrap.mlp": "width of the feed-forward layer",
    "bootstrap.batch": "demonstrations a step",
    "bootstrap.lr": "learning rate of the first steps",
    "bootstrap.noisy_lr": "learning rate of the further steps",
    "bootstrap.seed": "of the base model, so that runs of different seeds share one",
    "bootstrap.cache": "keep the model under `CCPO_CACHE` (default `~/.cache/ccpo`) and use it again",
    "agents.NAME.model": "a Hugging Face name or folder for this agent",
    "agents.NAME.lr": "its learning rate",
    "agents.NAME.frozen": "it speaks and is not trained",
    "agents.NAME.max_tokens": "as in `rollout`",
    "agents.NAME.temperature": "as in `rollout`",
    "agents.NAME.top_p": "as in `rollout`",
    "agents.NAME.top_k": "as in `rollout`",
    "agents.NAME.stop": "as in `rollout`",
    "rollout.temperature": "of the samples; also the one at which the update takes their log-probs",
    "rollout.top_p": "nucleus of the samples; 1 cuts nothing",
    "rollout.top_k": "the most likely tokens that may be sampled; 0 cuts nothing",
    "rollout.stop": "texts at which a completion ends",
    "rollout.max_tokens": "longest completion",
    "rollout.max_prompt_tokens": "longest prompt; messages are cut to fit, the problem never",
    "rollout.removal": "what stands in the place of a removed agent's message: [teams](teams.md#removal)",
    "rollout.placeholder": "the text of `removal: placeholder`",
    "loss.kind": "the importance ratio and its clip",
    "loss.clip_low": "the ratio is trusted from 1 - this",
    "loss.clip_high": "the ratio is trusted up to 1 + this",
    "loss.dual_clip": "bound of the loss for negative advantages, as a multiple of the advantage; null: off",
    "loss.aggregate": "how the loss of the tokens is averaged",
    "loss.kl": "estimator of the divergence from the reference, the policy at the start (LoRA: its base)",
    "loss.kl_coef": "weight of the divergence",
    "loss.entropy_coef": "weight of the entropy; positive: rewarded",
    "loss.old_logprobs": (
        "whose log-probs are the ratio's denominator; `auto`: the learner's, by a forward pass where a step has several "
        "updates"
    ),
    "optim.lr": "learning rate",
    "optim.warmup_steps": "steps of linear warm-up",
    "optim.decay": "what follows the warm-up, to 0 at `trainer.steps` or when `trainer.tokens` are spent",
    "optim.betas": "of AdamW",
    "optim.eps": "of AdamW",
    "optim.weight_decay": "of AdamW",
    "optim.max_grad_norm": "gradients are scaled down to this norm, for each policy",
    "optim.epochs": "passes over a step's rollouts",
    "trainer.steps": "last step",
    "trainer.schedule": "all agents in every step, or one at a time",
    "trainer.eval_every": "steps between evaluations; 0: before and after only",
    "trainer.save_every": "steps between checkpoints; 0: at the end only",
    "trainer.keep_checkpoints": "the newest so many stay",
    "trainer.shuffle": "another order of the problems in each epoch",
    "eval.samples": "samples a problem, for pass@k and majority@k",
    "eval.temperature": "0: greedy",
    "eval.top_p": "nucleus of the samples",
    "eval.ablations": "before and after training also: each agent alone, and the team without each agent",
    "log.tensorboard": "write TensorBoard files, where it is installed",
    "log.wandb": "log to Weights & Biases; an error where it is not installed",
    "log.trackio": "log to trackio; an error where it is not installed",
    "log.project": "name of the project at these loggers",
    "log.episodes": "write every rollout: [episodes](episodes.md)",
    "log.progress": "show the steps: a bar on a terminal, lines elsewhere",
}

INTRO = """# Every key of a recipe

<!-- Written by docs/make_recipe_reference.py from the code. Do not edit: run it again. -->

A recipe is a YAML file of sections. Every key has a default but `task`; a key that is not listed here is refused, with
the nearest right name. `--set path.to.key=value` overrides a key from the command line, the value in YAML:

```console
ccpo train demo --set trainer.steps=50 --set credit.kind=shared --set run.dir=runs/shared
```

`team`, `task`, `credit` and each entry of `eval.tasks` name a `kind`; the keys beside it are that kind's arguments, listed
[below](#kinds). A `kind` with a colon, `module:attribute`, is a class or function of your own; its arguments are checked
in the same way. Another `kind` by `--set` drops the arguments of the old one.
"""


def reference() -> str:
    """The whole text of ``docs/recipes.md``."""
    parts = [INTRO, "## Recipes that ship with the package\n", _shipped()]
    for name, field in RunConfig.model_fields.items():
        parts.append(f"## {name}\n\n{MEANINGS[name][0].upper()}{MEANINGS[name][1:]}.\n")
        parts.append(_section(name, field))
    parts.append("## Kinds\n")
    for name, table in (("team", TEAMS), ("task", TASKS), ("credit", RULES)):
        parts += [_kind(f"{name}.kind: {kind}", make) for kind, make in table.items()]
    return "\n".join(parts)


def _shipped() -> str:
    rows = [
        (f"`{name}`", path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "))
        for name, path in shipped_recipes().items()
    ]
    return _table(("recipe", "what it does"), rows)


def _section(name: str, field: FieldInfo) -> str:
    section = _model_in(field.annotation)
    if section is None:
        return _table(HEADER, [_row(name, field)])
    prefix = f"{name}.NAME" if get_origin(field.annotation) is dict else name
    if section is Part:
        kinds = {"team": TEAMS, "task": TASKS, "credit": RULES}[name]
        default = "required" if field.default is None else f"`{field.default.kind}`"
        word = "one of " + ", ".join(f"`{kind}`" for kind in kinds) + ", or `module:attribute`"
        return _table(HEADER, [(f"`{name}.kind`", word, default, "see [kinds](#kinds)")])
    return _table(HEADER, [_row(path, inner) for path, inner in keys(section, prefix)])


HEADER = ("key", "value", "default", "meaning")


def keys(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """The keys of a section and of those inside it, with their paths."""
    for name, field in section.model_fields.items():
        inner = next((a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type)), None)
        if inner is not None and issubclass(inner, Section):
            yield from keys(inner, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", field


def _model_in(annotation: Any) -> type | None:
    """The section that a field holds, directly, in a mapping by name or as an option."""
    found = [annotation, *get_args(annotation)]
    return next((a for a in found if isinstance(a, type) and issubclass(a, Section | Part)), None)


def _row(path: str, field: FieldInfo) -> tuple[str, str, str, str]:
    default = "required" if field.is_required() else f"`{_plain(field.get_default(call_default_factory=True))}`"
    bounds = _bounds(field.metadata)
    inside = [a for a in get_args(field.annotation) if a is not type(None)]
    optional = get_origin(field.annotation) in (Union, types.UnionType) and len(inside) == 1
    kind = " ".join(word for word in (_type(inside[0] if optional else field.annotation), bounds) if word)
    return (
        f"`{path}`",
        kind + (" or null" if optional else ""),
        default,
        field.description or MEANINGS[path],
    )


def _kind(title: str, make: Callable[..., Any]) -> str:
    """The arguments of a kind from its signature, with the first sentence of its docstring."""
    hints = get_type_hints(make.__init__ if inspect.isclass(make) else make)
    factories = dataclasses.fields(make) if dataclasses.is_dataclass(make) else ()
    made = {f.name: f.default_factory() for f in factories if f.default_factory is not dataclasses.MISSING}
    rows = [
        (
            f"`{name}`",
            _type(hints.get(name, Any)),
            "required" if p.default is inspect.Parameter.empty else f"`{_plain(made.get(name, p.default))}`",
        )
        for name, p in inspect.signature(make).parameters.items()
    ]
    table = _table(("argument", "value", "default"), rows) if rows else "No arguments.\n"
    return f"### `{title}`\n\n{_first_sentence(make)}\n\n{table}"


def _first_sentence(make: Callable[..., Any]) -> str:
    if make is TEAMS["custom"]:
        return "A team of your own: [teams](teams.md#a-team-in-yaml)."
    text = " ".join((inspect.getdoc(make) or "").partition("\n\n")[0].split())
    text = text.replace("``", "`").replace(":data:", "")
    return text.removesuffix(":") + ("" if text.endswith((".", ")")) else ".")


WORDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    type(None): "null",
    Any: "anything",
}


def _type(annotation: Any) -> str:
    """A type in words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metadata = [m for extra in inside[1:] for m in getattr(extra, "metadata", [extra])]
        return f"{_type(inside[0])} {_bounds(metadata)}".strip()
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(a) for a in inside)
    if origin is tuple and Ellipsis not in inside:
        return f"list of {len(inside)} {_type(inside[0])}s"
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return f"mapping of names to {_type(inside[1])}"
    if inspect.isclass(origin):
        return f"list of {'mappings' if get_origin(inside[0]) is Mapping else _type(inside[0]) + 's'}"
    if inspect.isclass(annotation) and issubclass(annotation, StrEnum):
        return ", ".join(f"`{value}`" for value in annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    return {"Verifier": "a function", "Part": "part with a `kind`"}.get(annotation.__name__, annotation.__name__)


SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _bounds(metadata: list[Any]) -> str:
    found = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in SIGNS.items() if hasattr(m, name)]
    return ", ".join(found)


def _plain(value: Any) -> str:
    """A default as YAML would have it."""
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return json.dumps(list(value))
    return json.dumps(value)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
