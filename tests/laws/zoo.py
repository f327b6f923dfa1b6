"""Tiny random models of every family that is tested, with weights large enough for attention to be far from uniform."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DynamicCache,
    Exaone4Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from learnevict import testbed

DEVICE = os.environ.get("LAWS_DEVICE", "cpu")
VOCABULARY = 96
WINDOW = 12
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
MIXED = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
WIDE = {"head_dim": 16}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 131072}


def configs() -> dict[str, PreTrainedConfig]:
    """By name; in those that end in _window no layer evicts."""
    return {
        "llama": LlamaConfig(**COMMON),
        "qwen2": Qwen2Config(**COMMON, use_sliding_window=False),
        "qwen3": Qwen3Config(**COMMON, **WIDE),
        "mistral": MistralConfig(**COMMON, sliding_window=None),
        "gemma2": Gemma2Config(**COMMON | MIXED | WIDE, sliding_window=WINDOW, query_pre_attn_scalar=16),
        "gemma3": Gemma3TextConfig(**COMMON | MIXED | WIDE, sliding_window=WINDOW, query_pre_attn_scalar=16),
        "phi3": Phi3Config(**COMMON, sliding_window=None),
        "gpt_oss": GptOssConfig(**COMMON | MIXED | WIDE | EXPERTS, sliding_window=WINDOW),
        "olmo3": Olmo3Config(**COMMON | MIXED, sliding_window=WINDOW),
        "smollm3": SmolLM3Config(**COMMON | {"num_hidden_layers": 3}, no_rope_layers=[1, 1, 0]),
        "exaone4": Exaone4Config(**COMMON | MIXED, sliding_window=WINDOW, sliding_window_pattern=3),
        "cohere2": Cohere2Config(**COMMON | MIXED, sliding_window=WINDOW, logit_scale=1.0),
        "granite": GraniteConfig(**COMMON, attention_multiplier=0.3, logits_scaling=0.5, residual_multiplier=0.8),
        "qwen3_moe": Qwen3MoeConfig(
            **COMMON | WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
        ),
        "gemma3_multimodal": Gemma3Config(
            text_config=Gemma3TextConfig(**COMMON | MIXED | WIDE, sliding_window=WINDOW, query_pre_attn_scalar=16),
            vision_config={**VISION, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_index=VOCABULARY - 1,
        ),
        "mistral_window": MistralConfig(**COMMON, sliding_window=WINDOW),
        "phi3_window": Phi3Config(**COMMON, sliding_window=WINDOW),
    }


STOCK_ONLY = ("mistral_window", "phi3_window")
MORE = ("olmo3", "smollm3", "exaone4", "cohere2", "granite", "qwen3_moe", "gemma3_multimodal")
"""Tried in full only: their attention differs from that of the others in one point each."""
RANDOM = tuple(name for name in configs() if name not in MORE)
TRAINED = ("testbed",) if (testbed.path() / "config.json").exists() else ()
MODELS = (*RANDOM, *TRAINED)
EVICTING = tuple(name for name in MODELS if name not in STOCK_ONLY)


def fresh(name: str, **changes: Any) -> PreTrainedModel:
    """A model of its own, for tests that change it."""
    if name in TRAINED:
        model, _ = testbed.load(device=DEVICE)
        model.set_attn_implementation("eager")
        return model
    config = configs()[name]
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=1.0)
        if parameter_name.endswith("k_norm.weight"):  # else all keys have one norm, and rounding ranks them
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False).to(DEVICE)


@cache
def build(name: str) -> PreTrainedModel:
    """A shared model in float32, in eval mode, without gradients."""
    return fresh(name)


def tokens(model: PreTrainedModel, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids int64 [B, T], special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.get_text_config().vocab_size, (batch, length), generator=generator).to(DEVICE)


def distinct_tokens(model: PreTrainedModel, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """As `tokens`, but none twice in a row: equal tokens have keys of equal norm in a first layer, so rounding would choose."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.get_text_config().vocab_size - 3
    return torch.stack([3 + torch.randperm(size, generator=generator)[:length] for _ in range(batch)]).to(DEVICE)


def stock_cache(model: PreTrainedModel) -> DynamicCache:
    """What the model would use by itself."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))
