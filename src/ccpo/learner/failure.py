"""What is kept of the batch that broke a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ccpo.errors import RunFailure
from ccpo.learner.rows import MicroBatch


def refuse(
    what: str, value: float, *, step: int, policy: str, at: list[tuple[str, int, MicroBatch]], folder: Path
) -> RunFailure:
    """The failure to raise for a ``what`` that is not finite, after writing the micro-batches ``at`` (agent, number,
    batch).

    Written: ``batch-K.safetensors`` (ids, mask, advantages, log-probs) and ``failure.json``. Where even that cannot be
    written the failure says so.
    """
    kept = f"The batch is in {folder}"
    try:
        _write(what, value, step, policy, at, folder)
    except OSError as error:
        kept = f"The batch could not be written to {folder} ({error.strerror})"
    where = ", ".join(sorted({f"agent {agent!r}, micro-batch {number}" for agent, number, _ in at}))
    return RunFailure(
        f"step {step}: the {what} of policy {policy!r} is {value} ({where}). Its weights were not changed. {kept}. "
        "Look at its advantages and log-probs; a lower optim.lr or model.compute: float32 often helps."
    )


def _write(
    what: str, value: float, step: int, policy: str, at: list[tuple[str, int, MicroBatch]], folder: Path
) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for place, (agent, number, batch) in enumerate(at):
        file = f"batch-{place}.safetensors"
        tensors = {
            name: getattr(batch, name).detach().cpu().contiguous()
            for name in (
                "ids_BL",
                "attention_BL",
                "mask_BT",
                "engine_BT",
                "advantage_B",
                "segment_B",
                "temperature_B",
                "old_BT",
                "ref_BT",
            )
            if getattr(batch, name) is not None
        }
        save_file(tensors, folder / file)
        entries.append(
            {"file": file, "agent": agent, "microbatch": number, "rows": len(batch.rows), "tokens": batch.tokens}
        )
    record = {"what": what, "value": str(value), "step": step, "policy": policy, "batches": entries}
    (folder / "failure.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
