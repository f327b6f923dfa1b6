"""Every causal language model of the installed transformers, as a tiny random model: what is served, what is refused and why.

python -m tests.laws.compatibility          writes docs/compatibility.md
python -m tests.laws.compatibility NAME     tries one architecture and shows its traceback
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from learnevict import attach, methods
from learnevict.errors import LearnevictError
from tests.closeness import distance
from tests.laws import zoo

FILE = Path(__file__).parents[2] / "docs" / "compatibility.md"
LARGEST = 20_000_000
"""Parameters of what is still run."""
ROUNDING = 1e-3
"""Of the largest logit: recurrences of tiny random models magnify rounding, and an error in a cache changes logits by more."""
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
SIZES: dict[str, Any] = {
    **{key: value for key, value in zoo.COMMON.items() if key != "attn_implementation"},
    "num_hidden_layers": 6,
    "ffn_dim": 48,
    "n_inner": 48,
    "ffn_hidden_size": 48,
    "encoder_layers": 6,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_layers": 6,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "head_dim": 8,
    "kv_channels": 8,
    "sliding_window": 12,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    **dict.fromkeys(EXPERTS, 4),
    **dict.fromkeys(PER_TOKEN, 2),
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size_per_layer_input": zoo.VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "image_token_index": zoo.VOCABULARY - 1,
    "image_token_id": zoo.VOCABULARY - 1,
    "is_decoder": True,
}
"""What is set of a configuration where it has a field of that name."""
VISION: dict[str, Any] = {**zoo.VISION, "image_size": 28, "patch_size": 14, "num_channels": 3}


@dataclass(frozen=True)
class Row:
    """One architecture. `outcome`: served, untouched, refused, broken or not tried."""

    name: str
    kind: str
    outcome: str
    told: str

    def __str__(self) -> str:
        return f"| {self.name} | {self.kind} | {self.told} |"


def names() -> list[str]:
    """Architectures that AutoModelForCausalLM opens."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrink(name: str) -> PreTrainedConfig:
    """A tiny configuration of an architecture: its defaults, but for sizes."""
    kind = CONFIG_MAPPING[name]
    parts = {part: shrink_part(inner, part) for part, inner in kind.sub_configs.items()}
    return kind(**fitting(kind, SIZES), **parts)


def shrink_part(kind: type[PreTrainedConfig], part: str) -> dict[str, Any]:
    """Sizes of a configuration inside another."""
    sizes = VISION if part.startswith("vision") else SIZES
    return fitting(kind, sizes) if hasattr(kind, "model_type") else dict(sizes)


def fitting(kind: type[PreTrainedConfig], sizes: dict[str, Any]) -> dict[str, Any]:
    """Those sizes that a configuration knows, by its own name for them."""
    known = set(vars(kind())) | set(kind.attribute_map)
    given = {key: value for key, value in sizes.items() if key in known}
    return {key: value for key, value in given.items() if kind.attribute_map.get(key) not in given}


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model; `changes` of its configuration, after all else.

    Raises:
        OverflowError: its configuration has sizes of other names.
    """
    config = shrink(name)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise OverflowError(f"{size:,} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def read(model: PreTrainedModel, cache: Any, pad: int) -> torch.Tensor:
    """Logits of a text read as prompt and three steps, [tokens, V]: two rows, of which one begins with `pad` columns."""
    ids = zoo.tokens(model, 2, 33)
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    places, parts = (mask.cumsum(-1) - 1).clamp_min(0), []
    accepts = "position_ids" in model.forward.__code__.co_varnames
    for start, stop in ((0, 30), (30, 31), (31, 32), (32, 33)):
        more = {"position_ids": places[:, start:stop]} if accepts else {}
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True, **more)
        parts.append(out.logits)
    return torch.cat(parts, 1)[mask.bool()]


def agrees_with_itself(model: PreTrainedModel) -> bool:
    """Whether reading in pieces with a stock cache gives what one forward gives."""
    ids = zoo.tokens(model, 2, 33)
    whole = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return distance(read(model, zoo.stock_cache(model), 0), whole.flatten(0, 1)) <= ROUNDING


@torch.no_grad()
def serve(model: PreTrainedModel) -> tuple[str, str]:
    """Outcome, and what the table tells of it.

    A budget that holds everything has to change no logit, and under a small one tokens have to go, by two methods.
    """
    policies = {name: methods.load(name).policy(16, slack=4, sinks=2, recent=3) for name in ("streaming_llm", "snapkv")}
    for pad in (4, 0):  # some recurrent states take up padding, and with it what attention makes of it: so in any cache
        with attach(model, methods.streaming_llm.policy(500, slack=4)) as cache:
            found = read(model, cache, pad)
        apart = distance(found, read(model, zoo.stock_cache(model), pad))
        if apart <= ROUNDING or "LinearAttentionLayer" not in {type(layer).__name__ for layer in cache.layers}:
            break
    if apart > ROUNDING and not agrees_with_itself(model):
        return "not tried", "the stock model gives other logits with its own cache than without one"
    if apart > ROUNDING:
        return "broken", f"logits differ by {apart:.1g} of the largest under a budget that holds everything"
    ids = zoo.tokens(model, 1, 30)
    for name, policy in policies.items():
        with attach(model, policy, record=True) as cache:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=6, min_new_tokens=6
            )
        if not cache.evicting:
            return "untouched", "no layer holds all tokens, so none is evicted"
        if not cache.trace().evictions:
            return "broken", f"{name} evicted nothing"
    return "served", f"{len(cache.evicting)} of {len(cache.layers)}"


def attempt(name: str) -> Row:
    """The row of one architecture."""
    try:
        model = build(name)
    except Exception as error:  # noqa: BLE001 - configurations of 189 kinds, each with conditions of its own
        return Row(name, "", "not tried", f"no tiny model can be made: {type(error).__name__}")
    kind = type(model).__name__
    try:
        outcome, told = serve(model)
        if outcome == "untouched" and getattr(model.config, "sliding_window", None) is not None:
            outcome, again = serve(build(name, sliding_window=None, layer_types=None))
            told = f"{again}, if `sliding_window` is null" if outcome == "served" else told
            outcome = outcome if outcome == "served" else "untouched"
        return Row(name, kind, outcome, told)
    except LearnevictError as error:
        return Row(name, kind, "refused", reason(error))
    except Exception as error:  # noqa: BLE001
        return Row(name, kind, "not tried", f"does not run as other models do: {type(error).__name__}")


def reason(error: LearnevictError) -> str:
    """What an error says of the model, without what to do about it."""
    return re.sub(r"\s+", " ", str(error)).split("; ")[0].split(": use ")[0].replace("|", r"\|")


def rows(chosen: Sequence[str] | None = None) -> list[Row]:
    """The rows of these architectures, or of all."""
    transformers_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [attempt(name) for name in chosen or names()]


HEADINGS = {
    "served": ("Served", "layers a policy governs"),
    "untouched": ("Served, but with nothing to evict", "why"),
    "refused": ("Refused", "reason"),
    "broken": ("Served wrongly", "how"),
    "not tried": ("Not tried", "why"),
}


def page(found: list[Row]) -> str:
    """docs/compatibility.md."""
    parts = [
        "# Models\n",
        f"Every architecture that `AutoModelForCausalLM` of transformers {transformers.__version__} opens, made tiny and "
        "random from its own configuration class, attached, and asked to generate. *Served* means: a budget that holds "
        "everything changes no logit of a padded batch, and under a budget of 16 `streaming_llm` and `snapkv` evict "
        "while `generate()` goes on. Layers that are not governed keep their stock cache (sliding windows, linear attention). "
        "Of multimodal models, text is served. Tiny models say nothing of quality.\n",
        "Gates rank the layers of a model on one device: a model whose layers compute on several is refused with gates, and "
        "served without them. Weights that are offloaded to the CPU or the disk count where they compute.\n",
        "Generated by `python -m tests.laws.compatibility`; a test compares this file with what it writes.\n",
        ", ".join(f"{sum(row.outcome == key for row in found)} {key}" for key in HEADINGS) + f", {len(found)} in all.",
    ]
    for key, (title, last) in HEADINGS.items():
        if lines := [str(row) for row in found if row.outcome == key]:
            parts += [f"\n## {title}\n", f"| architecture | class | {last} |", "|---|---|---|", *lines]
    return "\n".join(parts) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Write the page, or show one row."""
    for name in arguments:
        print(name, serve(build(name)))
    if not arguments:
        FILE.write_text(page(rows()), encoding="utf-8")
        print(f"wrote {FILE}")


if __name__ == "__main__":
    main(sys.argv[1:])
