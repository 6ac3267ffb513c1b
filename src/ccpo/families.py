"""The model families that this library runs by its own code, in the decoder and in the update: Qwen2, Qwen3 and Llama."""

from __future__ import annotations

from typing import Any

import torch

FAMILIES = ("llama", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")  # their frequencies do not depend on the length of the text


def bare(model: Any) -> Any:
    """The transformers model within a PeftModel; the model itself where there is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_dim(config: Any) -> int:
    """The width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    abilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if abilities.get("avx512_bf16") or abilities.get("amx_bf16") else torch.float32


def is_sharded(model: Any) -> bool:
    """Whether the model's weights are shards over ranks (FSDP2)."""
    return hasattr(model, "set_gradient_divide_factor")


def whole(tensor: Any) -> Any:
    """The tensor itself, or all of what it is a shard of; then all ranks must ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def unsupported(model: Any, adapter: str | None = None) -> str | None:
    """Why this model (or PeftModel with this adapter) is not run by the library's own code; None if it is."""
    config = getattr(bare(model), "config", None)
    if getattr(config, "model_type", None) not in FAMILIES:
        return f"its family {getattr(config, 'model_type', None)!r} is not one of {', '.join(FAMILIES)}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act!r}, not 'silu'"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "it has layers with sliding-window attention"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPES:
        return f"its rope type {rope!r} is not one of {', '.join(ROPES)}"
    if bare(model).model.rotary_emb.inv_freq.numel() * 2 != head_dim(config):
        return "it rotates only a part of each head"
    return _unfit_parameters(model, adapter)


def _unfit_parameters(model: Any, adapter: str | None) -> str | None:
    parameters = list(model.parameters())
    devices = {p.device for p in parameters}
    if len(devices) > 1 or next(iter(devices)).type == "meta":
        return f"its parameters are not on one device ({', '.join(sorted(map(str, devices)))})"
    quantised = getattr(bare(model).config, "quantization_config", None) is not None
    if quantised or not all(p.is_floating_point() for p in parameters):
        return "its weights are quantised"
    if adapter is None:
        return None
    plan = model.peft_config[adapter]
    if str(getattr(plan.peft_type, "value", plan.peft_type)) != "LORA":
        return f"its adapter {adapter!r} is not a LoRA"
    if plan.lora_bias or plan.bias != "none" or any(adapter in getattr(m, "lora_variant", {}) for m in model.modules()):
        return f"its adapter {adapter!r} is a variant of LoRA (DoRA and the like) or has a bias"
    if plan.trainable_token_indices or plan.target_parameters:
        return f"its adapter {adapter!r} adapts single tokens or bare parameters"
    return None
