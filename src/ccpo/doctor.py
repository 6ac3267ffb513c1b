"""``ccpo doctor``: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from ccpo.engines.vllm import WRITTEN_AGAINST
from ccpo.families import compute_dtype
from ccpo.kernels.compiled import instructions, why_not

NEEDED = {
    "torch": "the tensors",
    "transformers": "models and tokenizers",
    "peft": "LoRA agents",
    "safetensors": "checkpoints",
    "math_verify": "math answers",
}
OPTIONAL = {
    "datasets": ("data", "hub data sets"),
    "reasoning_gym": ("gym", "reasoning-gym tasks"),
    "tensorboard": ("tensorboard", "TensorBoard logs"),
    "wandb": ("wandb", "Weights & Biases logs"),
    "trackio": ("trackio", "trackio logs"),
}


def diagnose(console: Console | None = None) -> bool:
    """Print the tables; returns whether everything needed is there."""
    console = console or Console()
    machine = Table(title="Machine", show_header=False, box=None)
    machine.add_row("Python", platform.python_version())
    machine.add_row("Processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    machine.add_row(
        "bfloat16",
        "fast: the decoder and the update use it"
        if compute_dtype(torch.device("cpu")) is torch.bfloat16
        else "slow here: float32 is used",
    )
    machine.add_row("C code", "not used: " + reason if (reason := why_not()) else f"used, with {instructions()}")
    machine.add_row("CUDA", torch.cuda.get_device_name() if torch.cuda.is_available() else "none: runs on the CPU")
    machine.add_row("Free disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB")
    console.print(machine)
    packages = Table(title="Packages", box=None)
    packages.add_column("package")
    packages.add_column("version")
    packages.add_column("for")
    complete = True
    for module, purpose in NEEDED.items():
        found = _version(module)
        complete &= found is not None
        packages.add_row(module, found or "[red]missing[/red]", purpose if found else f"{purpose}; pip install ccpo")
    for module, (extra, purpose) in OPTIONAL.items():
        found = _version(module)
        packages.add_row(module, found or "–", purpose if found else f"{purpose}; pip install 'ccpo\\[{extra}]'")
    console.print(packages)
    engines = Table(title="Engines", box=None, show_header=False)
    engines.add_row("native", "Qwen2, Qwen3, Llama families")
    engines.add_row("transformers", "every other causal language model")
    engines.add_row("vllm", _vllm())
    engines.add_row("remote", "agents behind an OpenAI-compatible endpoint: agents.NAME.remote")
    console.print(engines)
    return complete


def _vllm() -> str:
    """Whether model.engine: vllm would run here."""
    found = _version("vllm")
    if found is None:
        return "not installed; pip install 'ccpo\\[vllm]' on a machine with CUDA"
    where = "" if torch.cuda.is_available() else "; it needs a GPU, and there is none here"
    return f"{found} (the adapter was written against {WRITTEN_AGAINST}){where}"


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return version(module.replace("_", "-"))
    except PackageNotFoundError:
        return "installed"
