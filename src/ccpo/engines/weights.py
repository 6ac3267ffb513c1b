"""The weights of a decoder-only transformer, fused for decoding: Q, K and V in one matrix, gate and up in one.

They are a copy in the engine's dtype; `refresh` reads the live model again, in place. A LoRA adapter is merged into the
copy (W + scaling * B A), so that decoding with it costs nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ccpo.engines.products import GatedPanels, GatedProduct, Panels, Product
from ccpo.families import bare, head_dim, whole

WIDE = 512  # hidden channels from which a CPU attends faster in bfloat16


@dataclass(slots=True, kw_only=True)
class Layer:
    """One block; ``qk_norm``: ``[heads + kv_heads, head_dim]``.

    Within each query and key head the channels are *interleaved*: those two that are rotated together stand side by side, so that
    a rotation is one product of complex numbers.
    """

    attention_norm: Tensor
    qkv: Product
    qk_norm: Tensor | None
    out: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product


@dataclass(slots=True, kw_only=True)
class Weights:
    """All of a model that decoding reads. ``dtype`` is that of the matrices; the attention and its cache are in ``attention_dtype``: on a
    CPU float32 in torch for models narrower than ``WIDE``, whose bfloat16 products would be slower. It hangs on the model alone: what is
    batched together must not matter. ``fused``: matrices in panels, and norms in float32, for `ccpo.engines.fused`."""

    source: Any
    adapter: str | None
    fused: bool
    dtype: torch.dtype
    attention_dtype: torch.dtype
    device: torch.device
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    eps: float
    vocab: int
    embed: Tensor
    norm: Tensor
    head: Product
    layers: list[Layer] = field(default_factory=list)
    inv_freq: Tensor
    rotation_scale: float
    rotation: Tensor | None = None

    @classmethod
    def of(cls, model: Any, *, dtype: torch.dtype, adapter: str | None, fused: bool = False) -> Weights:
        """Copies the weights of a model of these families (`ccpo.families.unsupported`)."""
        source = bare(model)
        config, body = source.config, source.model
        device = body.norm.weight.device
        with torch.no_grad():
            embed = _weight(body.embed_tokens, adapter).to(dtype, copy=True)
            plain = Panels if fused else Product
            made = cls(
                source=source,
                adapter=adapter,
                fused=fused,
                dtype=dtype,
                attention_dtype=torch.float32
                if device.type == "cpu" and config.hidden_size < WIDE and not fused
                else dtype,
                device=device,
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                head_dim=head_dim(config),
                scale=body.layers[0].self_attn.scaling,
                eps=config.rms_norm_eps,
                vocab=embed.shape[0],
                embed=embed,
                norm=whole(body.norm.weight).to(torch.float32 if fused else dtype, copy=True),
                head=plain(
                    *embed.shape,
                    bias=False,
                    dtype=dtype,
                    device=device,
                    weight=embed if _tied(source, adapter) else None,
                ),
                inv_freq=body.rotary_emb.inv_freq.detach().float(),
                rotation_scale=float(body.rotary_emb.attention_scaling),
            )
            made._read_head()
            made.layers = [made._layer(block) for block in body.layers]
        return made

    @property
    def split(self) -> list[int]:
        """Heads of queries, keys and values, as they stand side by side."""
        return [self.heads, self.kv_heads, self.kv_heads]

    def look(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """Attention of ``[B, heads, T, head_dim]`` queries over ``[B, kv_heads, C, head_dim]`` keys and values, at the model's scale."""
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=self.scale, enable_gqa=self.heads != self.kv_heads
        )

    def refresh(self) -> None:
        """Reads the live model again, into the same tensors."""
        body = self.source.model
        with torch.no_grad():
            self.embed.copy_(_weight(body.embed_tokens, self.adapter))
            self.norm.copy_(whole(body.norm.weight))
            self._read_head()
            for layer, block in zip(self.layers, body.layers, strict=True):
                self._read(layer, block)

    def _read_head(self) -> None:
        """The head's weights; a head that reads the embedding's own tensor has them already."""
        tied = _tied(self.source, self.adapter)
        with self.head.rewritten() as (rows, _):
            if rows is not self.embed:
                rows.copy_(self.embed if tied else _weight(self.source.lm_head, self.adapter))

    def _layer(self, block: Any) -> Layer:
        """An empty layer of the block's shape, filled."""
        attention, mlp = block.self_attn, block.mlp
        hidden, inner = block.input_layernorm.weight.shape[0], mlp.down_proj.in_features
        wide, every = self.heads * self.head_dim, self.heads + 2 * self.kv_heads
        plain, gated = (Panels, GatedPanels) if self.fused else (Product, GatedProduct)
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}

        def product(kind: type[Product], outputs: int, inputs: int, module: Any) -> Product:
            return kind(outputs, inputs, bias=module.bias is not None, **options)

        norms = (self.heads + self.kv_heads, self.head_dim)
        layer = Layer(
            attention_norm=torch.empty(hidden, dtype=self.norm.dtype, device=self.device),
            qkv=product(plain, every * self.head_dim, hidden, attention.q_proj),
            qk_norm=torch.empty(norms, dtype=torch.float32, device=self.device)
            if hasattr(attention, "q_norm")
            else None,
            out=product(plain, hidden, wide, attention.o_proj),
            mlp_norm=torch.empty(hidden, dtype=self.norm.dtype, device=self.device),
            gate_up=product(gated, 2 * inner, hidden, mlp.gate_proj),
            down=product(plain, hidden, inner, mlp.down_proj),
        )
        self._read(layer, block)
        return layer

    def _read(self, layer: Layer, block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        layer.attention_norm.copy_(whole(block.input_layernorm.weight))
        layer.mlp_norm.copy_(whole(block.post_attention_layernorm.weight))
        with layer.qkv.rewritten() as written:
            _stack(*written, (attention.q_proj, attention.k_proj, attention.v_proj), self.adapter)
            for rows in written:
                if rows is not None:
                    turning = rows[: (self.heads + self.kv_heads) * self.head_dim].unflatten(0, (-1, self.head_dim))
                    turning.copy_(_interleaved(turning, 1))
        for product, modules in (
            (layer.out, (attention.o_proj,)),
            (layer.gate_up, (mlp.gate_proj, mlp.up_proj)),
            (layer.down, (mlp.down_proj,)),
        ):
            with product.rewritten() as written:
                _stack(*written, modules, self.adapter)
        if layer.qk_norm is not None:
            layer.qk_norm[: self.heads] = _interleaved(whole(attention.q_norm.weight), 0)
            layer.qk_norm[self.heads :] = _interleaved(whole(attention.k_norm.weight), 0)

    def rotations(self, length: int) -> Tensor:
        """``scale * exp(i * angle)`` of positions 0 to at least ``length - 1``, complex: ``[positions, head_dim / 2]``."""
        if self.rotation is None or len(self.rotation) < length:
            length = 1 << (length - 1).bit_length()
            angle = torch.arange(length, device=self.device, dtype=torch.float32)[:, None] * self.inv_freq
            self.rotation = torch.polar(torch.full_like(angle, self.rotation_scale), angle)
        return self.rotation


def _interleaved(x: Tensor, dim: int) -> Tensor:
    """The two halves of a dimension, one from each in turn: ``0, n/2, 1, n/2 + 1, ...``"""
    return torch.stack(x.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def _stack(into: Tensor, bias: Tensor | None, modules: tuple[Any, ...], adapter: str | None) -> None:
    """Writes the modules' weights, and biases, below one another."""
    start = 0
    for module in modules:
        weight = _weight(module, adapter)
        end = start + weight.shape[0]
        into[start:end] = weight
        if bias is not None:
            bias[start:end] = whole(module.bias)
        start = end


def _weight(module: Any, adapter: str | None) -> Tensor:
    """The weight that the module applies when ``adapter`` speaks: fully trained copies and LoRA updates included."""
    if adapter in getattr(module, "modules_to_save", ()):
        module = module.modules_to_save[adapter]
    elif hasattr(module, "original_module"):
        module = module.original_module
    weight = whole(module.weight.detach())
    updated = adapter in getattr(module, "lora_A", {}) or adapter in getattr(module, "lora_embedding_A", {})
    return weight + module.get_delta_weight(adapter) if updated and not module.merged else weight


def _tied(source: Any, adapter: str | None) -> bool:
    """Whether the head reads the very matrix of the embedding, and no adapter changes only one of them."""
    embed, head = source.model.embed_tokens, source.lm_head
    adapted = any(hasattr(m, "lora_A") or hasattr(m, "modules_to_save") for m in (embed, head))
    return not adapted and embed.weight is head.weight
