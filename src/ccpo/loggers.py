"""Metric sinks: TensorBoard, Weights & Biases and trackio behind one small interface. A sink that fails is dropped with a warning
and never stops the training: the run's own ``metrics.jsonl`` has everything."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ccpo.errors import UserError

log = logging.getLogger("ccpo")


FAILURES = (Exception, SystemExit)
"""Whatever a third party's logger raises, or calls to end the program, must not stop a run. An interrupt is the user's and passes."""


class Sink(Protocol):
    """Where metrics are copied to: a line of plain floats a step, and an end. A new one is a class and a line in :func:`make_sinks`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoardSink:
    """All figures of a step in one event, which costs a tenth of an event for each."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import FileWriter

        self.summary = Summary
        self.writer = FileWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self.writer.add_summary(self.summary(value=values), step)

    def close(self) -> None:
        self.writer.close()


class RunSink:
    """Weights & Biases and trackio, which share their interface."""

    def __init__(self, module: Any, project: str, name: str, config: Mapping[str, Any]) -> None:
        self.module = module
        module.init(project=project, name=name, config=dict(config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Mapping[str, Callable[[], Sink]]) -> None:
        self.sinks: dict[str, Sink] = {}
        for name, make in sinks.items():
            try:
                self.sinks[name] = make()
            except FAILURES as error:
                log.warning("%s could not be started and is left out: %s", name, error)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                sink.write(step, metrics)
            except FAILURES as error:
                log.warning("%s failed at step %d and is left out from here on: %s", name, step, error)
                del self.sinks[name]

    def close(self) -> None:
        for name, sink in self.sinks.items():
            try:
                sink.close()
            except FAILURES as error:
                log.warning("%s could not be closed: %s", name, error)


def make_sinks(
    folder: Path, *, tensorboard: bool, wandb: bool, trackio: bool, project: str, name: str, config: Mapping[str, Any]
) -> Sinks:
    """The sinks asked for. TensorBoard is used where it is installed; wandb and trackio are asked for by name, so that their
    absence is an error (UserError)."""
    makers: dict[str, Callable[[], Sink]] = {}
    if tensorboard and importlib.util.find_spec("tensorboard") is not None:
        makers["tensorboard"] = lambda: TensorBoardSink(folder / "tensorboard")
    for wanted, module in ((wandb, "wandb"), (trackio, "trackio")):
        if not wanted:
            continue
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"log.{module} is true but {module} is not installed; pip install 'ccpo[{module}]' or set log.{module}=false"
            )
        makers[module] = lambda module=module: RunSink(importlib.import_module(module), project, name, config)
    return Sinks(makers)
