"""Tiny random models and tokenizers for tests: no hub, no files, a few kilobytes each."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import AutoConfig

FAMILIES = ("qwen2", "qwen3", "llama", "gpt2")
SPECIALS = ("<pad>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "Think step by step and put the final answer in \\boxed{42}.",
    "What is the sum of 17 and 25? The answer is 42.",
    "A train leaves the station at noon; how far has it gone after three hours?",
    '{"outcome": "correct", "pair": [0.5, 0.5]}',
)


def tiny_tokenizer(chat_template: bool = False, *, bpe: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token a character (printable ASCII and newline: 101 tokens, text round-trips), or with ``bpe`` a byte-level
    BPE of at most 360 tokens that encodes any text. End token ``<eos>``, or ``<|im_end|>`` with a chat template."""
    tokenizer = _byte_bpe() if bpe else _characters()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>" if pad else None,
        eos_token="<|im_end|>" if chat_template else "<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def _characters() -> Tokenizer:
    characters = ["\n", *map(chr, range(32, 127))]
    vocab = {token: index for index, token in enumerate([*SPECIALS, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def tiny_model(family: str = "qwen2", vocab: int = 101, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of ``family`` in fp32 and eval mode; ``overrides`` go to its config. Biases and norms are random
    too, so that an engine which forgets one of them is caught. ``<eos>`` (id 1) is its end token."""
    if family == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    else:
        shape = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        }
        if family == "qwen3":
            shape["head_dim"] = 16
    common = {"vocab_size": vocab, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **{**common, **shape, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
