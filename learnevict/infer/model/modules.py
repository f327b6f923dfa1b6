"""Finding the parts of a model that hooks go to: its decoder, its attention modules, its rotary embedding."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from learnevict.errors import ModelError


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Returns the model's self-attention modules by layer index."""
    found: dict[int, nn.Module] = {}
    both_ways: list[int] = []
    for module in decoder_of(model).modules():
        index = getattr(module, "layer_idx", None)
        dispatches = "ALL_ATTENTION_FUNCTIONS" in modelling_names(module)
        if type(module).__name__.endswith("Attention") and isinstance(index, int) and dispatches:
            if getattr(module, "is_causal", True):
                found[index] = module
            else:  # an encoder's, or cross-attention beside the layer's own
                both_ways.append(index)
    if both_ways and not found:
        raise ModelError(
            f"{type(model).__name__} attends in both directions, so what it has read depends on what comes; use a decoder "
            "(some encoders become one with is_decoder=True in their configuration)"
        )
    if not found:
        raise ModelError(
            f"{type(model).__name__} does not dispatch attention through transformers' AttentionInterface, so learnevict "
            "cannot serve it; Llama, Qwen2, Qwen3, Mistral, Gemma2, Gemma3, Phi3 and GPT-OSS are tested"
        )
    return found


def modelling_names(module: nn.Module) -> dict[str, Any]:
    """Names of the modelling file that a module's class, or the one it derives from, is written in."""
    files = [vars(sys.modules[kind.__module__]) for kind in type(module).__mro__]
    return next((names for names in files if "ALL_ATTENTION_FUNCTIONS" in names), {})


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Returns the module that holds the text's layers."""
    decoder = model.get_decoder()
    return model if decoder is None else decoder


def front_of(model: PreTrainedModel) -> nn.Module:
    """Returns the module that receives the 2D attention mask: the decoder, or what wraps it with encoders of images."""
    decoder = decoder_of(model)
    if getattr(decoder, "config", None) is model.config:
        return decoder
    around = (
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and module.get_output_embeddings() is None
        and any(one is decoder for one in module.modules())
    )
    return next(around, decoder)


def device_of(module: nn.Module) -> torch.device:
    """Returns where a module computes; offloaded weights (meta tensors until accelerate's hooks fill them) are elsewhere."""
    own = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    if own.type != "meta":
        return own
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    found = (device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None)
    return torch.device(next(found, own))


def attention_settings(config: PreTrainedConfig) -> str | dict[str, Any]:
    """Returns what `set_attn_implementation` takes to bring back how a model and the models inside it attend now.

    One without models inside is named by a word: transformers 5.17 takes nothing else of an inner model.
    """
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    inner = {name: attention_settings(part) for name, part in parts.items() if part is not None}
    own = config._attn_implementation or "eager"  # None until a model is made of it
    return {"": own, **inner} if inner else own


@dataclass(frozen=True)
class Rotation:
    """How one attention module rotates queries and keys, if at all. The buffer is named, not held: dynamic RoPE replaces it."""

    rotary: nn.Module
    name: str
    applied: bool

    def frequencies(self, given: dict[str, Any]) -> Tensor:
        """Radians per position [r] in a forward with these keyword arguments; zeros where nothing is rotated."""
        found = getattr(self.rotary, self.name)
        applied = self.applied and given.get("position_embeddings", ()) is not None
        return found if applied else torch.zeros_like(found)


def rotation_of(decoder: nn.Module, module: nn.Module) -> Rotation | None:
    """Returns how `module` rotates queries and keys; None if that is unknown, or neighbouring dimensions rather than halves."""
    names, applied = modelling_names(module), applies_rope(module)
    if "rotate_half" in names:
        halves = names["rotate_half"](torch.arange(4)).tolist() == [-2, -3, 0, 1]
    else:
        halves = "_apply_rotary_emb" in names  # GPT-OSS
    rotary = getattr(decoder, "rotary_emb", None)
    kinds = getattr(getattr(decoder, "config", None), "layer_types", None)  # Gemma3: frequencies per kind of layer
    own = f"{kinds[module.layer_idx]}_inv_freq" if kinds else ""  # pyright: ignore[reportArgumentType]
    name = next((name for name in (own, "inv_freq") if hasattr(rotary, name)), None)
    several = hasattr(decoder, "rotary_embs")  # one per layer, under a name that tells nothing
    known = applied is False or (applied and halves and not several)
    return Rotation(rotary, name, bool(applied)) if known and rotary is not None and name is not None else None


def applies_rope(module: nn.Module) -> bool | None:
    """Returns whether a module's forward rotates queries and keys, by the conditions under which its source does so.

    Models without RoPE in some layers have a rotary embedding all the same, and each tells those layers in its own way
    (`use_rope`, `sliding_window`, ...). None: it does not call transformers' `apply_rotary_pos_emb`, or under a condition
    that is about more than the module.
    """
    try:
        calls = _rope_calls(type(module))
        return any(all(_value(test, module) for test in tests) for tests in calls) if calls else None
    except (AttributeError, LookupError):
        return None


@cache
def _rope_calls(kind: type[nn.Module]) -> list[tuple[ast.expr, ...]]:
    """Returns the conditions that have to hold for each call of `apply_rotary_pos_emb` in the forward of this class."""
    try:
        source = textwrap.dedent(inspect.getsource(kind.forward))
    except (OSError, TypeError):
        return []
    return list(_rope_conditions(ast.parse(source)))


def _rope_conditions(node: ast.AST, tests: tuple[ast.expr, ...] = ()) -> Iterator[tuple[ast.expr, ...]]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "apply_rotary_pos_emb":
        yield tests
    for field, value in ast.iter_fields(node):
        inner = tests
        if isinstance(node, ast.If) and field != "test":
            inner = (*tests, node.test if field == "body" else ast.UnaryOp(ast.Not(), node.test))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _rope_conditions(child, inner)


def _value(node: ast.expr, module: nn.Module) -> Any:
    """Returns the value of a condition over attributes of `self`. Raises LookupError for anything else."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id="self"):
            return module
        case ast.Name(id="position_embeddings"):
            return ()  # what a forward is given is seen there: Rotation.frequencies
        case ast.Attribute(value=owner, attr=name):
            return getattr(_value(owner, module), name)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, module)
        case ast.BoolOp(op=op, values=values):
            return (all if isinstance(op, ast.And) else any)([bool(_value(value, module)) for value in values])
        case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as op], comparators=[right]):
            return (_value(left, module) is _value(right, module)) == isinstance(op, ast.Is)
        case _:
            raise LookupError(ast.dump(node))
