"""Parts of recipes/pretrain.py beside its loop: a curriculum that climbs by accuracy, Muon, accuracy, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from learnevict import testbed
from learnevict.files import replacing_folder
from learnevict.testbed import Sample
from learnevict.testbed.clauses import final_answer
from learnevict.testbed.vocabulary import PAD

TOKENIZER = testbed.build_tokenizer()
IDS: dict[str, int] = TOKENIZER.get_vocab()
CHECKPOINT: Any = (("model.safetensors", "optimizers.safetensors", "state.json"), "state.json", b'"curve": ')
EXPORTED: Any = (
    ("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "record.json", "tokenizer.json",
     "tokenizer_config.json"),
    "record.json", b'"recipe": ',
)  # fmt: skip
"""Of a folder: the files in it, which of them shows that this program wrote it, and by what."""
TOP = testbed.NUM_LEVELS - 1


class Curriculum:
    """The level of every family, and the running accuracy on fresh samples that decides about the next."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.level: dict[str, int] = dict.fromkeys(testbed.FAMILIES, 0)
        self.accuracy: dict[str, float] = dict.fromkeys(testbed.FAMILIES, 0.0)
        self.promoted: list[list[Any]] = []
        if state:
            self.level, self.accuracy, self.promoted = state["level"], state["accuracy"], state["promoted"]

    def draw(self, rng: Random, evenness: float) -> tuple[str, int]:
        """Draws a family, the lagging ones more often, and a level, mostly its highest."""
        lag = [evenness + (1 - self.accuracy[name]) + 0.15 * (TOP - self.level[name]) for name in testbed.FAMILIES]
        family = rng.choices(testbed.FAMILIES, lag)[0]
        level = self.level[family]
        return family, level if rng.random() < 0.8 else rng.randint(0, level)

    def update(self, step: int, counts: list[list[float]], promote_at: float) -> None:
        """Takes in right and seen answer-mask tokens of a step at each family's highest level; promotes families that pass."""
        for family, (right, seen) in zip(testbed.FAMILIES, counts, strict=True):
            keep = 0.98 ** (seen / 40)
            self.accuracy[family] = keep * self.accuracy[family] + (1 - keep) * right / max(1.0, seen)
            if self.accuracy[family] > promote_at and self.level[family] < TOP:
                self.level[family] += 1
                self.accuracy[family] *= 0.5
                self.promoted.append([step, family, self.level[family]])


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Jordan et al., 2024), in float32 and stacked by shape.

    Associative recall, which is most of what this model has to learn, takes far fewer steps than with AdamW.
    """

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every matrix once."""
        group, shapes = self.param_groups[0], {}
        for parameter in group["params"]:
            shapes.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in shapes.items():
            updates = []
            for parameter in parameters:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                updates.append(parameter.grad.lerp(average, group["momentum"]))
            scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                parameter.mul_(1 - 0.1 * group["lr"]).sub_(update, alpha=scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Pushes all singular values towards 1 by five quintic Newton-Schulz steps, [N, rows, columns]."""
    tall = matrices.shape[1] > matrices.shape[2]
    matrices = matrices.mT if tall else matrices
    matrices = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = matrices @ matrices.mT
        matrices = 3.4445 * matrices + (-4.7750 * square + 2.0315 * square @ square) @ matrices
    return matrices.mT if tall else matrices


def rank() -> int:
    """Returns the number of this process among those of torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Returns how many processes train."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(gradients: list[Tensor], counts: Tensor) -> Tensor:
    """Adds up gradients (in place) and counts over processes, in one message per step."""
    if not dist.is_initialized():
        return counts
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [counts.to(gradients[0].device)])
    dist.all_reduce(flat)
    pieces = flat.split([gradient.numel() for gradient in gradients] + [len(counts)])
    for gradient, piece in zip(gradients, pieces, strict=False):
        gradient.copy_(piece.view_as(gradient))
    return pieces[-1].cpu()


def batches(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Splits samples into groups of similar length whose padded size stays below the limit."""
    groups: list[list[Sample]] = [[]]
    for sample in sorted(samples, key=lambda sample: len(sample.answer_mask)):
        if groups[-1] and (len(groups[-1]) + 1) * len(sample.answer_mask) > max_tokens:
            groups.append([])
        groups[-1].append(sample)
    return groups


def to_tensors(samples: Sequence[Sample], ids: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns token ids, loss weights and answer masks [B, T], padded on the right: causal attention then needs no mask."""
    width = max(len(sample.answer_mask) for sample in samples)
    tokens = torch.full((len(samples), width), ids[PAD])
    weights = torch.zeros(len(samples), width)
    answer_mask = torch.zeros(len(samples), width, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample.answer_mask)
        tokens[row, :length] = torch.tensor([ids[word] for word in sample.text.split()])
        weights[row, :length] = torch.tensor(sample.weights)
        answer_mask[row, :length] = torch.tensor(sample.answer_mask)
    return tokens, weights, answer_mask


@torch.no_grad()
def step_accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> tuple[float, float]:
    """Returns the share of answer-mask tokens right given the reference text, and of samples with no wrong response token."""
    ids, right, seen, perfect = tokenizer.get_vocab(), 0, 0, 0
    for group in batches(samples, 10_000):
        tokens, weights, answer_mask = (tensor.to(model.device) for tensor in to_tensors(group, ids))
        hits = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1) == tokens[:, 1:]
        right, seen = right + int((hits & answer_mask[:, 1:]).sum()), seen + int(answer_mask.sum())
        perfect += int((hits | (weights[:, 1:] == 0)).all(-1).sum())
    return right / seen, perfect / len(samples)


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 400,
    rows: int = 50,
) -> float:
    """Returns the share of final answers right under greedy generation, in left-padded batches of so many rows."""
    right = 0
    for start in range(0, len(samples), rows):
        group = samples[start : start + rows]
        inputs = tokenizer([sample.prompt for sample in group], return_tensors="pt", padding=True).to(model.device)
        generated = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max_new_tokens, do_sample=False
        )
        texts = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :])
        right += sum(final_answer(text) == sample.answer for sample, text in zip(group, texts, strict=True))
    return right / len(samples)


def accuracy_of(model: Any, num_samples: int, length: str = "normal") -> dict[str, dict[str, float]]:
    """Returns of each family's validation seeds accuracy on answer-mask tokens and of samples without a wrong one."""
    found = {family: step_accuracy(model, TOKENIZER, samples) for family, samples in validation(num_samples, length)}
    return {
        family: {"step_accuracy": round(step, 5), "all_right": round(perfect, 4)}
        for family, (step, perfect) in found.items()
    }


def answers_of(model: Any, num_samples: int, max_new_tokens: int, length: str = "normal") -> dict[str, float]:
    """Returns, of each family's validation seeds, the exact match of final answers under greedy generation."""
    return {
        family: exact_match(model, TOKENIZER, samples, max_new_tokens=max_new_tokens)
        for family, samples in validation(num_samples, length)
    }


def validation(num_samples: int, length: str) -> Iterator[tuple[str, list[Sample]]]:
    """Yields every family with its first validation samples."""
    for family in testbed.FAMILIES:
        yield (
            family,
            [testbed.generate(family, seed, split="validation", length=length) for seed in range(num_samples)],
        )


def save(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    """Writes a checkpoint beside the old one and swaps them, so that a killed run always finds a complete one."""
    moments: dict[str, Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        for index, entry in optimizer.state_dict()["state"].items():
            moments |= {f"{number}/{index}/{key}": value.contiguous() for key, value in entry.items()}
    with replacing_folder(folder / "checkpoint", *CHECKPOINT) as fresh:
        save_file({name: value.contiguous() for name, value in model.named_parameters()}, fresh / "model.safetensors")
        save_file(moments, fresh / "optimizers.safetensors")
        (fresh / "state.json").write_text(json.dumps(state))


def restore(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any] | None:
    """Loads the checkpoint if there is one, and returns its state."""
    found = folder / "checkpoint"
    if not (found / "state.json").exists():
        return None
    model.load_state_dict(load_file(found / "model.safetensors"), strict=False)  # the tied head is not stored
    moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, value in load_file(found / "optimizers.safetensors").items():
        number, index, name = key.split("/")
        moments[int(number)].setdefault(int(index), {})[name] = value
    for optimizer, entries in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((found / "state.json").read_text())


def restore_exported(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Loads the weights of an exported model, and returns its training state; its optimisers are new."""
    state = json.loads((folder / "record.json").read_text())["training"]
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return state | {"fresh": state["step"]}
