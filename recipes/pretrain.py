"""Train the bundled reasoning model from scratch: the clean tasks first, then decoys, then filler.

    torchrun --nproc-per-node 2 recipes/pretrain.py              # one thread per process: two CPU cores
    python recipes/pretrain.py --smoke                           # seconds, same code
    python recipes/pretrain.py --out /tmp/testbed_run --export   # write the current weights as the package's data folder

Trained on the cluttered tasks at once, a model of this size sits at chance for thousands of steps; after the clean tasks it needs a few
hundred. So every family climbs five levels, and climbs when its accuracy on fresh samples says so, not when a step count does.
The run resumes exactly: all randomness is a function of the seed and the step, all state is safetensors and JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from learnevict import testbed
from learnevict.testbed import Sample

TOP = 4
TOKENIZER = testbed.build_tokenizer()
IDS: dict[str, int] = TOKENIZER.get_vocab()


@dataclass(frozen=True)
class Config:
    """One run. The learning rate is constant after warm-up and falls as a cosine over the last `cooldown` steps."""

    out: str = "/tmp/testbed_run"
    data: str = str(testbed.path())
    seed: int = 0
    steps: int = 8000
    cooldown: int = 1600
    warmup: int = 200
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    tokens_per_step: int = 7000
    tokens_per_pass: int = 2500
    promote_at: float = 0.96
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    evaluate_every: int = 500
    evaluate_samples: int = 32
    final_samples: int = 200
    threads: int = 1
    compiled: bool = False
    device: str = "cpu"
    smoke: bool = False
    export: bool = False


def build_model(config: Config) -> Qwen3ForCausalLM:
    """A randomly initialised model whose vocabulary is the testbed's."""
    torch.manual_seed(config.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(TOKENIZER), hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, head_dim=config.head_dim,
            num_key_value_heads=config.num_key_value_heads, max_position_embeddings=2048, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, pad_token_id=TOKENIZER.pad_token_id,
            bos_token_id=TOKENIZER.bos_token_id, eos_token_id=TOKENIZER.eos_token_id, initializer_range=0.05,
        )
    )  # fmt: skip


class Curriculum:
    """The level of every family, and the running accuracy on fresh samples that decides about the next."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.level: dict[str, int] = {family: 0 for family in testbed.FAMILIES}
        self.accuracy: dict[str, float] = {family: 0.0 for family in testbed.FAMILIES}
        self.promoted: list[list[Any]] = []
        if state:
            self.level, self.accuracy, self.promoted = state["level"], state["accuracy"], state["promoted"]

    def draw(self, rng: Random) -> tuple[str, int]:
        """A family, the lagging ones more often, and a level, mostly its highest."""
        lag = [0.2 + (1 - self.accuracy[family]) + 0.15 * (TOP - self.level[family]) for family in testbed.FAMILIES]
        family = rng.choices(testbed.FAMILIES, lag)[0]
        level = self.level[family]
        return family, level if rng.random() < 0.8 else rng.randint(0, level)

    def update(self, step: int, counts: list[list[float]], promote_at: float) -> None:
        """Take in a step's right and seen checked tokens at each family's highest level; promote who passes."""
        for family, (right, seen) in zip(testbed.FAMILIES, counts, strict=True):
            keep = 0.98 ** (seen / 40)
            self.accuracy[family] = keep * self.accuracy[family] + (1 - keep) * right / max(1.0, seen)
            if self.accuracy[family] > promote_at and self.level[family] < TOP:
                self.level[family] += 1
                self.accuracy[family] *= 0.5
                self.promoted.append([step, family, self.level[family]])


def passes(samples: list[Sample], tokens_per_pass: int) -> list[list[Sample]]:
    """Split into groups of similar length whose padded size stays below the limit."""
    groups: list[list[Sample]] = [[]]
    for sample in sorted(samples, key=lambda sample: len(sample.checked)):
        if groups[-1] and (len(groups[-1]) + 1) * len(sample.checked) > tokens_per_pass:
            groups.append([])
        groups[-1].append(sample)
    return groups


def forward(model: nn.Module, samples: list[Sample], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, hits, weights and sample rows of all tokens with weight; right padding needs no mask under causal attention."""
    width = max(len(sample.checked) for sample in samples)
    ids = torch.full((len(samples), width), IDS["<pad>"])
    weights = torch.zeros(len(samples), width)
    checked = torch.zeros(len(samples), width, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample.checked)
        ids[row, :length] = torch.tensor([IDS[word] for word in sample.text.split()])
        weights[row, :length] = torch.tensor(sample.weights)
        checked[row, :length] = torch.tensor(sample.checked)
    ids, weights, checked = ids.to(device), weights.to(device), checked.to(device)
    with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # pyright: ignore
        rows, columns = weights[:, 1:].nonzero(as_tuple=True)
        logits = model.lm_head(hidden[rows, columns]).float()  # pyright: ignore
    target = ids[rows, columns + 1]
    losses = nn.functional.cross_entropy(logits, target, reduction="none") * weights[rows, columns + 1]
    return losses, logits.argmax(-1) == target, checked[rows, columns + 1], rows


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, curriculum: Curriculum, step: int
) -> float:
    """Draw fresh samples, step once, and tell the curriculum how it went. Returns the mean loss."""
    rng = Random(f"{config.seed}/{step}/{rank()}")
    drawn: list[tuple[Sample, bool]] = []
    while sum(len(sample.checked) for sample, _ in drawn) < config.tokens_per_step / num_ranks():
        family, level = curriculum.draw(rng)
        sample = testbed.generate(family, rng.getrandbits(48), split="train", level=None if level == TOP else level)
        drawn.append((sample, level == curriculum.level[family]))
    at_top = {id(sample) for sample, top in drawn if top}
    counts = torch.zeros(2 + 2 * len(testbed.FAMILIES))
    for group in passes([sample for sample, _ in drawn], config.tokens_per_pass):
        losses, hits, checked, rows = forward(model, group, config.device)
        losses.sum().backward()
        counts[0] += losses.sum().item()
        counts[1] += sum(sum(sample.weights) for sample in group)
        for row, sample in enumerate(group):
            if id(sample) in at_top:
                mine, place = checked & (rows == row), 2 + 2 * testbed.FAMILIES.index(sample.family)
                counts[place] += int((mine & hits).sum())
                counts[place + 1] += int(mine.sum())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    counts = sum_over_ranks(gradients, counts)
    for gradient in gradients:
        gradient /= counts[1]
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate(config, step)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    curriculum.update(step, counts[2:].view(-1, 2).tolist(), config.promote_at)
    return float(counts[0] / counts[1])


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(gradients: list[Tensor], counts: Tensor) -> Tensor:
    """Add up gradients (in place) and counts in one message. One meeting per step keeps busy cores from waiting."""
    if not dist.is_initialized():
        return counts
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [counts.to(gradients[0].device)])
    dist.all_reduce(flat)
    pieces = flat.split([gradient.numel() for gradient in gradients] + [len(counts)])
    for gradient, piece in zip(gradients, pieces, strict=False):
        gradient.copy_(piece.view_as(gradient))
    return pieces[-1].cpu()


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, constant, cosine to a twentieth at the end."""
    left = (config.steps - step) / max(1, config.cooldown)
    fall = 1.0 if left >= 1 else 0.05 + 0.95 * (0.5 - 0.5 * math.cos(math.pi * left))
    return config.learning_rate * min(1.0, (step + 1) / config.warmup) * fall


@torch.no_grad()
def measure(model: nn.Module, config: Config, num_samples: int, length: str = "normal") -> dict[str, dict[str, float]]:
    """Per family on validation seeds, teacher-forced: accuracy on checked tokens, share of samples with every token right."""
    result = {}
    for family in testbed.FAMILIES:
        samples = [testbed.generate(family, seed, split="validation", length=length) for seed in range(num_samples)]
        right = seen = perfect = 0
        for group in passes(samples, 4 * config.tokens_per_pass):
            _, hits, checked, rows = forward(model, group, config.device)
            right, seen = right + int((hits & checked).sum()), seen + int(checked.sum())
            perfect += sum(bool(hits[rows == row].all()) for row in range(len(group)))
        result[family] = {"step_accuracy": round(right / seen, 5), "all_right": round(perfect / num_samples, 4)}
    return result


@torch.no_grad()
def exact_match(model: Any, num_samples: int, device: str, length: str = "normal") -> dict[str, float]:
    """Per family on validation seeds: share of final answers right under greedy generation with the full cache."""
    result = {}
    for family in testbed.FAMILIES:
        samples = [testbed.generate(family, seed, split="validation", length=length) for seed in range(num_samples)]
        right = 0
        for start in range(0, num_samples, 50):
            batch = samples[start : start + 50]
            inputs = TOKENIZER([sample.prompt for sample in batch], return_tensors="pt", padding=True).to(device)
            inputs.pop("token_type_ids", None)
            out = model.generate(**inputs, max_new_tokens=400, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            texts = [TOKENIZER.decode(row) for row in out]
            right += sum(testbed.verify(sample, text) for sample, text in zip(batch, texts, strict=True))
        result[family] = right / num_samples
    return result


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write a checkpoint beside the old one and swap, so that a killed run always finds a whole one."""
    fresh, old = folder / "checkpoint.new", folder / "checkpoint"
    fresh.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.named_parameters()}, fresh / "model.safetensors")
    moments = {
        f"{i}/{key}": value for i, entry in optimizer.state_dict()["state"].items() for key, value in entry.items()
    }
    save_file({key: value.contiguous() for key, value in moments.items()}, fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps(state))
    shutil.rmtree(old, ignore_errors=True)
    os.replace(fresh, old)


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Load the checkpoint if there is one; returns its state."""
    found = folder / "checkpoint" if (folder / "checkpoint").exists() else folder / "checkpoint.new"
    if not (found / "state.json").exists():
        return None
    model.load_state_dict(load_file(found / "model.safetensors"), strict=False)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(found / "optimizer.safetensors").items():
        index, name = key.split("/")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((found / "state.json").read_text())


def export(config: Config, state: dict[str, Any]) -> dict[str, Any]:
    """Write the data folder: bfloat16 weights, tokenizer, and a record of what they reach once rounded and reloaded."""
    target = Path(config.data)
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model = build_model(config)
    model.load_state_dict(load_file(Path(config.out) / "checkpoint/model.safetensors"), strict=False)
    model.to(torch.bfloat16).save_pretrained(fresh)
    TOKENIZER.save_pretrained(fresh)
    special = {"pad_token_id": IDS["<pad>"], "bos_token_id": IDS["<bos>"], "eos_token_id": IDS["<end>"]}
    GenerationConfig(**special, do_sample=False, max_new_tokens=400).save_pretrained(fresh)
    model = Qwen3ForCausalLM.from_pretrained(fresh, dtype=torch.float32).to(config.device).eval()  # pyright: ignore
    num = config.final_samples
    record = {
        "recipe": {**asdict(config), "out": "", "data": ""}, "fingerprint": testbed.fingerprint(), "num_samples": num,
        "split": "validation", "accuracy": measure(model, config, num), "exact_match": exact_match(model, num, config.device),
        "long": {"accuracy": measure(model, config, num // 4, "long"), "exact_match": exact_match(model, num // 4, config.device, "long")},
        "training": state, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    (fresh / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)
    return record


def main(config: Config) -> None:
    """Train, or with `export` only write what the last checkpoint holds."""
    torch.set_num_threads(config.threads)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if config.device.startswith("cuda") else "gloo")
    folder = Path(config.out)
    model = build_model(config).to(config.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=config.weight_decay)
    state = restore(folder, model, optimizer) or {"step": 0, "seconds": 0.0, "curve": []}
    if not config.export:
        train(config, model, optimizer, state)
    if rank() == 0:
        record = export(config, state)
        print(json.dumps({key: record[key] for key in ("accuracy", "exact_match", "long")}))


def train(config: Config, model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """All steps from where the state stands; rank 0 logs, saves and evaluates."""
    for layer in model.model.layers if config.compiled else ():
        layer.compile(dynamic=True)
    curriculum, running, begin = Curriculum(state.get("curriculum")), 0.0, state["step"]
    for step in (
        bar := tqdm(range(begin, config.steps), mininterval=30, initial=begin, total=config.steps, disable=rank() > 0)
    ):
        began = time.perf_counter()
        loss = train_step(model, optimizer, config, curriculum, step)
        running = loss if not running else 0.98 * running + 0.02 * loss
        state["seconds"] += time.perf_counter() - began
        if rank() == 0 and ((step + 1) % 50 == 0 or step + 1 == config.steps):
            row = {"step": step + 1, "loss": round(running, 4), "seconds": round(state["seconds"])}
            row |= {f: f"{curriculum.level[f]}:{curriculum.accuracy[f]:.3f}" for f in testbed.FAMILIES}
            state["curve"].append(row)
            bar.write(json.dumps(row))
            state |= {"step": step + 1, "curriculum": vars(curriculum)}
            save(Path(config.out), model, optimizer, state)
        if rank() == 0 and (step + 1) % config.evaluate_every == 0:
            bar.write(f"step {step + 1} validation {json.dumps(measure(model, config, config.evaluate_samples))}")


def parse() -> Config:
    """Every field of Config is a flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Config):
        if isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    config = Config(**vars(parser.parse_args()))
    if not config.smoke:
        return config
    tiny = dict(
        out="/tmp/testbed_smoke", data="/tmp/testbed_smoke/data", steps=3, cooldown=1, warmup=1, tokens_per_step=600
    )
    tiny |= dict(
        evaluate_every=3, evaluate_samples=2, final_samples=4, hidden_size=32, intermediate_size=64, num_layers=2
    )
    return Config(**{**asdict(config), **tiny})


if __name__ == "__main__":
    main(parse())
