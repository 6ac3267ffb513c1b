"""Checkpoints: ``RUN/checkpoints/step-000050/``, whole or absent, checked before they are believed, and without pickle.

    policies/NAME/    a Hugging Face folder: the model (of a policy in shards, a file from each rank), or the LoRA adapter, with its tokenizer
    agents/AGENT      a link to the folder of the policy that the agent speaks with
    optimizers/       AdamW's tensors of each policy that is trained
    state.json        versions, random state and what the caller gave (tensors in state.safetensors)
    manifest.json     format, step, and size and SHA-256 of every file

All of it is written to a hidden folder beside it, flushed to disk and renamed, so that a kill at any time leaves the
checkpoints before it as they were.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ccpo.comm import Comm
from ccpo.errors import RunFailure, UserError
from ccpo.learner import lora as adapters
from ccpo.learner.loading import quiet
from ccpo.learner.manifest import flush, read_manifest, verify, write_manifest
from ccpo.learner.policies import Policy
from ccpo.learner.sharding import Part, gather_parts, plain_class
from ccpo.learner.state import random_state, read_state, restore_random_state, write_state
from ccpo.learner.update import Learner

FOLDER = "checkpoints"
UNFINISHED = ".unfinished-"
_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(
    folder: str | Path,
    step: int,
    policies: Mapping[str, Policy],
    learner: Learner,
    extra_state: Mapping[str, Any],
    *,
    keep: int = 2,
    comm: Comm | None = None,
) -> Path:
    """Write the checkpoint of ``step`` finished steps into the run folder, and delete all but the newest ``keep``.

    ``comm``: the ranks, which must all ask together and see one disk; each writes its part of the policies that are sharded, the first one
    the rest. ``extra_state``: nested strings, numbers and tensors, given back by :func:`load_checkpoint`. Raises RunFailure where
    the disk refuses (nothing is left behind, and what was there before stays), ValueError for a state that cannot be
    kept.
    """
    if keep < 1:
        raise ValueError(f"keep is the number of checkpoints that stay, at least 1; got {keep}")
    comm = comm or Comm()
    place = Path(folder) / FOLDER
    unfinished = place / f"{UNFINISHED}{comm.gather_plain(os.getpid())[0]}"
    final = place / f"step-{step:06d}"
    parts = gather_parts(policies, learner.optimizers, comm)

    @_disk_refusals(place, step)
    def begin() -> None:
        for stale in place.glob(f"{UNFINISHED}*"):  # what a kill left behind
            shutil.rmtree(stale)
        for name in policies:
            (unfinished / "policies" / name).mkdir(parents=True)
        (unfinished / "optimizers").mkdir()

    @_disk_refusals(place, step)
    def write_parts() -> dict[str, dict[str, str]]:
        return {name: _write_part(unfinished, name, part, comm) for name, part in parts.items()}

    @_disk_refusals(place, step)
    def finish() -> None:
        _write(unfinished, step, policies, learner, extra_state, files)
        _publish(unfinished, final)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)

    try:
        comm.first_alone(begin)
        files = comm.gather_plain(comm.together(write_parts))
        comm.first_alone(finish)
    finally:
        if comm.first:
            shutil.rmtree(unfinished, ignore_errors=True)
    return final


@contextmanager
def _disk_refusals(place: Path, step: int) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunFailure(
            f"step {step}: the checkpoint could not be written to {place} ({error}); the ones before it are untouched."
        ) from error


def load_checkpoint(
    checkpoint: str | Path,
    policies: Mapping[str, Policy],
    learner: Learner | None = None,
    comm: Comm | None = None,
) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint into live policies and, where given, the learner's optimisers; torch's random state too.

    Everything goes on bit for bit as it would have. ``comm``: the ranks, which must all ask together; there may be more or fewer of them
    than wrote it. Returns the number of finished steps and the extra state. Raises UserError for a checkpoint that is damaged (naming the
    file, and the newest sound one before it) or that belongs to other policies; nothing live has been changed then, unless a tensor's
    shape is what is wrong.
    """
    folder, comm = Path(checkpoint), comm or Comm()
    comm.first_alone(lambda: verify_checkpoint(folder))
    return comm.together(lambda: _load(folder, policies, learner))


def _load(folder: Path, policies: Mapping[str, Policy], learner: Learner | None) -> tuple[int, dict[str, Any]]:
    state = read_state(folder)
    saved = state["versions"]
    if set(saved) != set(policies):
        raise UserError(
            f"{folder} holds the policies {', '.join(sorted(saved))}, but the team has {', '.join(sorted(policies))}. "
            "Were agents, their policies or model.sharing changed?"
        )
    for name, policy in policies.items():
        _load_weights(policy, folder / "policies" / name)
        policy.version = saved[name]
    if learner is not None:
        _load_optimizers(learner, folder)
    restore_random_state(state["random"])
    return read_manifest(folder)["step"], state["extra"]


def list_checkpoints(run: str | Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first, by their names alone."""
    place = Path(run) / FOLDER
    folders = [p for p in place.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if place.is_dir() else []
    return sorted(folders, key=_step)


def find_checkpoint(run: str | Path) -> Path | None:
    """The newest checkpoint of a run, or None. Loading verifies it, and refuses with an offer."""
    found = list_checkpoints(run)
    return found[-1] if found else None


def verify_checkpoint(checkpoint: str | Path) -> int:
    """Check every file's size and SHA-256 against the manifest; returns the step. Raises UserError naming the file that
    is wrong and the newest checkpoint before it that is sound."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint {folder}; give a folder like RUN/{FOLDER}/step-000050.")
    wrong = verify(folder)
    if wrong is None:
        return read_manifest(folder)["step"]
    run = folder.parent.parent
    older = [c for c in list_checkpoints(run) if _step(c) < _step(folder)]
    sound = next((c for c in reversed(older) if verify(c) is None), None)
    if sound is None:
        offer = "There is no sound checkpoint before it: start the run again."
    else:
        offer = (
            f"{sound.name} before it is sound: remove {folder} and go on from there, with ccpo train --resume {run}."
        )
    raise UserError(f"the checkpoint {folder} is damaged: {wrong}. {offer}")


def _step(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def _write_part(folder: Path, name: str, part: Part, comm: Comm) -> dict[str, str]:
    """Write this rank's part of a policy; returns the file of each of its weights."""
    from safetensors.torch import save_file

    file = f"model-{comm.rank + 1:05d}-of-{comm.size:05d}.safetensors"
    save_file(dict(part.weights), folder / "policies" / name / file, metadata={"format": "pt"})
    if part.optimizer is not None:
        save_file(dict(part.optimizer), folder / "optimizers" / file.replace("model", name, 1))
    return dict.fromkeys(part.weights, file)


def _write(
    folder: Path,
    step: int,
    policies: Mapping[str, Policy],
    learner: Learner,
    extra: Mapping[str, Any],
    parts: Sequence[Mapping[str, Mapping[str, str]]],
) -> None:
    """All but what :func:`_write_part` has written: ``parts`` is what it returned, by rank and policy."""
    from safetensors.torch import save_file

    (folder / "agents").mkdir()
    for name, policy in policies.items():
        target = folder / "policies" / name
        if name in parts[0]:
            _describe_parts(policy, target, {weight: file for part in parts for weight, file in part[name].items()})
        else:
            _save_weights(policy, target)
        policy.tokenizer.save_pretrained(target)
        for agent in policy.agents:
            _link(folder / "agents" / agent, target)
    for name, optimizer in learner.optimizers.items():
        if name not in parts[0]:
            tensors = {key: value.detach().cpu().contiguous() for key, value in optimizer.tensors().items()}
            save_file(tensors, folder / "optimizers" / f"{name}.safetensors")
    versions = {name: policy.version for name, policy in policies.items()}
    write_state(folder, {"versions": versions, "random": random_state(), "extra": extra})
    write_manifest(folder, step)


def _save_weights(policy: Policy, folder: Path) -> None:
    if policy.adapter is not None:
        adapters.save_adapter(policy.model, policy.adapter, folder)
        return
    with quiet():
        policy.model.save_pretrained(folder)


def _describe_parts(policy: Policy, folder: Path, files: Mapping[str, str]) -> None:
    """What makes the files of all ranks one Hugging Face model: its configuration, and which weight is in which file."""
    config = json.loads(policy.model.config.to_json_string())
    config |= {
        "architectures": [plain_class(policy.model).__name__],
        "dtype": str(policy.model.dtype).partition(".")[2],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    policy.model.generation_config.save_pretrained(folder)
    size = sum((folder / file).stat().st_size for file in set(files.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _link(agent: Path, policy: Path) -> None:
    """The agent's folder: a relative link, or a copy on a file system without links."""
    try:
        agent.symlink_to(Path("..") / "policies" / policy.name, target_is_directory=True)
    except OSError:
        shutil.copytree(policy, agent)


def _publish(unfinished: Path, final: Path) -> Path:
    """Flush to disk and rename. One of the same step (the run went back) makes way once its successor is flushed."""
    flush(unfinished)
    replaced = final.with_name(f"{UNFINISHED}replaced-{final.name}")
    if final.exists():
        os.replace(final, replaced)
    os.replace(unfinished, final)
    flush(final.parent, recursive=False)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _load_weights(policy: Policy, folder: Path) -> None:
    """Overwrite the live weights in place, so that engines that hold the model see them."""
    if policy.adapter is not None:
        adapters.load_adapter(policy.model, policy.adapter, folder)
        return
    with quiet():
        # the class itself reads it back, since some families store tensors under other names than they run with
        saved = plain_class(policy.model).from_pretrained(
            folder, dtype=policy.model.dtype, use_safetensors=True, local_files_only=True
        )
    adapters.copy_into(policy.parameters(), dict(saved.named_parameters()), str(folder))
    adapters.copy_into(_buffers(policy.model), _buffers(saved), str(folder))


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are saved with the weights."""
    stored = set(model.state_dict())
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def _load_optimizers(learner: Learner, folder: Path) -> None:
    from safetensors.torch import load_file

    for name, optimizer in learner.optimizers.items():
        part = re.compile(re.escape(name) + r"(-\d{5}-of-\d{5})?\.safetensors")
        files = [file for file in sorted((folder / "optimizers").iterdir()) if part.fullmatch(file.name)]
        if not files:
            raise UserError(
                f"{folder} holds no optimiser of policy {name!r}, which was frozen then; unfreezing it needs a run of "
                "its own."
            )
        optimizer.load({key: value for file in files for key, value in load_file(file).items()}, str(files[0]))
