"""Random models of several sizes, which never end a turn by themselves, so that all sides decode equally many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ccpo.bootstrap import character_tokenizer
from ccpo.learner.loading import quiet

ALPHABET = "0123456789+ TS:=abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Size:
    """A Qwen2 of ``hidden`` x ``layers``; ``vocab`` 0: that of the character tokenizer."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int = 0


SIZES = {
    "1M": Size(128, 4, 4, 2, 384),
    "5M": Size(256, 6, 8, 4, 768, 1_024),
    "25M": Size(512, 8, 8, 4, 1_536, 2_048),
    "100M": Size(768, 14, 12, 4, 2_304, 4_096),
    # the shapes of Qwen2.5-0.5B and 1.5B, for a GPU
    "0.5B": Size(896, 24, 14, 2, 4_864, 151_936),
    "1.5B": Size(1_536, 28, 12, 2, 8_960, 151_936),
}


def tokenizer() -> Any:
    return character_tokenizer(ALPHABET)


def make_model(size: str, *, device: str = "cpu", positions: int = 4_096, sharp: bool = False) -> Any:
    """A random float32 model of the size, in eval mode. ``sharp``: one that hangs on every word and its place, to check results with; it may
    end its turns."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape, words = SIZES[size], tokenizer()
    config = Qwen2Config(
        vocab_size=shape.vocab or len(words),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if sharp:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 2:
                    weight.normal_(std=(0.5 if "embed" in name else 1.5) * weight.shape[1] ** -0.5)
    else:
        # nor says what the tokenizer has no text for: rewards hang on texts
        never_says(model, [words.eos_token_id, words.pad_token_id, *range(len(words), config.vocab_size)])
        model.generation_config.eos_token_id = words.eos_token_id
    return model.eval()


@torch.no_grad()
def never_says(model: Any, tokens: list[int]) -> None:
    """Makes these tokens too improbable to be sampled: the first channel is large at every position, and only they read it, negatively."""
    model.model.embed_tokens.weight[:, 0] = 4.0
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[tokens] = 0.0
    model.lm_head.weight[tokens, 0] = -10.0


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def save(size: str, folder: Path, device: str = "cpu") -> Path:
    """The model, made on ``device``, and its tokenizer as a Hugging Face folder."""
    with quiet():
        make_model(size, device=device).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder
