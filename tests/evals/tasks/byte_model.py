"""A tiny model of single bytes: it reads any text, and answers nothing sensible."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.laws import zoo

TEMPLATE = (
    "{% for message in messages %}<user>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def tokenizer() -> Any:
    """Bytes and four special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate(["<pad>", "<user>", "<end>", "<bot>", *letters])}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), pre_tokenizers.Split("", "isolated")]
    )
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    fast.chat_template = TEMPLATE
    return fast


def model() -> LlamaForCausalLM:
    """Weights from one seed, for 260 tokens."""
    config = zoo.configs()["llama"]
    config.vocab_size, config.max_position_embeddings = 260, 4096
    config.eos_token_id, config.pad_token_id = 2, 0
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()
