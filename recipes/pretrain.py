"""Trains the bundled reasoning model from scratch: the clean tasks first, then decoys, then filler.

    torchrun --nproc-per-node 2 recipes/pretrain.py --compiled   # one thread per process: two CPU cores
    python recipes/pretrain.py --smoke                           # seconds, same code
    python recipes/pretrain.py --export                          # write the last checkpoint as the package's data
    python recipes/pretrain.py --further --steps 9000            # train the exported model further, at its last level

Trained on the cluttered tasks at once, a model of this size sits at chance for thousands of steps; after the clean
tasks it needs a few hundred. So every family climbs five levels, and climbs when its accuracy on fresh samples says so, not
when a step count does. The run resumes exactly on as many processes: all randomness is a function of the seed, the step
and the rank, all state is safetensors and JSON. An exported model holds no optimiser state: training it further warms up anew.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from learnevict import testbed
from learnevict.errors import UsageError, told_in_one_line
from learnevict.files import check_folder, locked, replacing_folder
from learnevict.hub.run_record import Record
from learnevict.testbed import Sample
from learnevict.train.run.flags import check_fields, flag, read_flags
from tools.pretraining import (
    CHECKPOINT,
    EXPORTED,
    IDS,
    TOKENIZER,
    TOP,
    Curriculum,
    Muon,
    accuracy_of,
    answers_of,
    batches,
    num_ranks,
    rank,
    restore,
    restore_exported,
    save,
    sum_over_ranks,
    to_tensors,
)

SMOKE = {
    "steps": 3, "cooldown": 1, "warmup": 1, "tokens_per_step": 600, "evaluate_every": 3, "evaluate_samples": 2,
    "final_samples": 2, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "max_new_tokens": 4,
    "out": "runs/testbed-smoke",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One run. Learning rates are constant after warm-up and fall as a cosine over the last `cooldown` steps."""

    out: str = flag("checkpoints/testbed", "folder of the checkpoint; a run goes on with what it finds there")
    export_to: str = flag(
        "", "a new folder, or one of an earlier export; otherwise the package's data, with --smoke OUT/data"
    )
    seed: int = flag(0, "of weights and samples")
    steps: int = flag(9000, "in all")
    cooldown: int = flag(1200, "last steps, over which learning rates fall")
    warmup: int = flag(100, "first steps, over which learning rates rise")
    learning_rate: float = flag(3e-3, "AdamW: embeddings and norms")
    matrix_learning_rate: float = flag(0.01, "Muon: everything else")
    tokens_per_step: int = flag(4000, "of all processes")
    tokens_per_pass: int = flag(2500, "of a process at a time")
    promote_at: float = flag(0.9, "accuracy at which a family climbs a level", most=1)
    evenness: float = flag(0.2, "of the draw over families: large is even, small favours those with many errors")
    hidden_size: int = flag(128, "of the model")
    intermediate_size: int = flag(384, "of its MLPs")
    num_layers: int = flag(4, "of the model")
    num_heads: int = flag(4, "query heads of a layer")
    num_key_value_heads: int = flag(2, "of a layer")
    head_dim: int = flag(32, "of a head")
    evaluate_every: int = flag(500, "steps")
    evaluate_samples: int = flag(16, "of each family, while training")
    final_samples: int = flag(200, "of each family, for the record of the export")
    max_new_tokens: int = flag(400, "of an answer")
    threads: int = flag(1, "of torch", most=1024)
    device: str = flag("cpu", "of the model")
    compiled: bool = flag(False, "compile the layers")
    smoke: bool = flag(False, "seconds, the same code")
    export: bool = flag(False, "train nothing; write the last checkpoint as an exported model")
    further: bool = flag(False, "where `out` holds no checkpoint, begin with the model and the record in `export_to`")

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def settings(self) -> dict[str, Any]:
        """Returns all settings but folders."""
        return {**asdict(self), "out": "", "export_to": ""}

    @property
    def target(self) -> Path:
        """Returns the folder of the exported model."""
        return Path(self.export_to or (Path(self.out) / "data" if self.smoke else testbed.path()))


def build_model(config: Config) -> Qwen3ForCausalLM:
    """Returns a randomly initialised model whose vocabulary is the testbed's."""
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


def build_optimizers(config: Config, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of the layers, AdamW for embeddings and norms; a group's `peak` is its learning rate."""
    matrices = [value for name, value in model.named_parameters() if value.ndim == 2 and "embed" not in name]
    others = [value for name, value in model.named_parameters() if value.ndim < 2 or "embed" in name]
    muon, adam = Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    muon.param_groups[0]["peak"], adam.param_groups[0]["peak"] = config.matrix_learning_rate, config.learning_rate
    return [muon, adam]


def forward(model: Qwen3ForCausalLM, samples: list[Sample], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns losses, hits, answer masks and sample rows of all tokens with weight."""
    ids, weights, checked = (tensor.to(device) for tensor in to_tensors(samples, IDS))
    rows, columns = weights[:, 1:].nonzero(as_tuple=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[rows, columns]).float()
    target = ids[rows, columns + 1]
    losses = nn.functional.cross_entropy(logits, target, reduction="none") * weights[rows, columns + 1]
    return losses, logits.argmax(-1) == target, checked[rows, columns + 1], rows


def train_step(
    model: Qwen3ForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    config: Config,
    curriculum: Curriculum,
    step: int,
    fresh: int = 0,
) -> float:
    """Draws fresh samples, steps once and updates the curriculum; optimisers were new at step `fresh`.

    Returns the mean loss.
    """
    rng = Random(f"{config.seed}/{step}/{rank()}")
    drawn: list[Sample] = []
    at_top: set[int] = set()
    while sum(len(sample.answer_mask) for sample in drawn) < config.tokens_per_step / num_ranks():
        family, level = curriculum.draw(rng, config.evenness)
        seed = rng.getrandbits(48)
        drawn.append(testbed.generate(family, seed, split="train", level=None if level == TOP else level))
        at_top |= {id(drawn[-1])} if level == curriculum.level[family] else set()
    counts = torch.zeros(2 + 2 * len(testbed.FAMILIES))
    for group in batches(drawn, config.tokens_per_pass):
        losses, hits, checked, rows = forward(model, group, config.device)
        losses.sum().backward()
        counts[0] += losses.sum().item()
        counts[1] += sum(sum(sample.weights) for sample in group)
        for row, sample in enumerate(group):
            if id(sample) in at_top:
                mine, place = checked & (rows == row), 2 + 2 * testbed.FAMILIES.index(sample.family)
                counts[place] += int((mine & hits).sum())
                counts[place + 1] += int(mine.sum())
    counts = update(model, optimizers, counts, schedule(config, step, fresh))
    curriculum.update(step, counts[2:].view(-1, 2).tolist(), config.promote_at)
    return float(counts[0] / counts[1])


def update(model: nn.Module, optimizers: list[torch.optim.Optimizer], counts: Tensor, rate: float) -> Tensor:
    """Steps on the mean gradient of all ranks, and returns the counts of all ranks."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    counts = sum_over_ranks(gradients, counts)
    for gradient in gradients:
        gradient /= counts[1]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return counts


def schedule(config: Config, step: int, fresh: int) -> float:
    """Returns the factor of the learning rate: warm-up from step `fresh`, constant, cosine to a twentieth at the end."""
    left = (config.steps - step) / max(1, config.cooldown)
    fall = 1.0 if left >= 1 else 0.05 + 0.95 * (0.5 - 0.5 * math.cos(math.pi * left))
    return min(1.0, (step + 1 - fresh) / config.warmup) * fall


def train(
    config: Config, model: Qwen3ForCausalLM, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]
) -> None:
    """Runs all steps from where the state stands; rank 0 logs, saves and evaluates."""
    for layer in model.model.layers if config.compiled else ():
        layer.compile(dynamic=True)
    curriculum, running, begin = Curriculum(state.get("curriculum")), 0.0, state["step"]
    stage = {"from": begin, "fingerprint": testbed.fingerprint(), **config.settings}  # flags may change on resuming
    state["stages"] = [*state.get("stages", []), stage]
    bar = tqdm(range(begin, config.steps), mininterval=30, initial=begin, total=config.steps, disable=rank() > 0)
    for step in bar:
        began = time.perf_counter()
        loss = train_step(model, optimizers, config, curriculum, step, state.get("fresh", 0))
        running = loss if not running else 0.98 * running + 0.02 * loss
        state["seconds"] += time.perf_counter() - began
        if rank() == 0 and ((step + 1) % 50 == 0 or step + 1 == config.steps):
            row = {"step": step + 1, "loss": round(running, 4), "seconds": round(state["seconds"])}
            row |= {name: f"{curriculum.level[name]}:{curriculum.accuracy[name]:.3f}" for name in testbed.FAMILIES}
            state["curve"].append(row)
            bar.write(json.dumps(row))
            state |= {"step": step + 1, "curriculum": vars(curriculum)}
            save(Path(config.out), model, optimizers, state)
        if rank() == 0 and (step + 1) % config.evaluate_every == 0:
            bar.write(f"step {step + 1} validation {json.dumps(accuracy_of(model, config.evaluate_samples))}")


def export(config: Config, state: dict[str, Any]) -> None:
    """Writes the exported model: bfloat16 weights, tokenizer, and a record of what they reach once rounded and reloaded."""
    model, target = build_model(config), config.target
    model.load_state_dict(load_file(Path(config.out) / "checkpoint/model.safetensors"), strict=False)
    special = {"pad_token_id": IDS["<pad>"], "bos_token_id": IDS["<bos>"], "eos_token_id": IDS["<end>"]}
    num, few, tokens = config.final_samples, max(1, config.final_samples // 4), config.max_new_tokens
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(target.name + ".export")), replacing_folder(target, *EXPORTED) as fresh:
        model.to(torch.bfloat16).save_pretrained(fresh)
        TOKENIZER.save_pretrained(fresh)
        GenerationConfig(**special, do_sample=False, max_new_tokens=tokens).save_pretrained(fresh)
        model = Qwen3ForCausalLM.from_pretrained(fresh, dtype=torch.float32).to(config.device).eval()
        record = {
            "recipe": config.settings, "fingerprint": testbed.fingerprint(), "split": "validation",
            "num_samples": num, "accuracy": accuracy_of(model, num), "exact_match": answers_of(model, num, tokens),
            "long": {"num_samples": few, "accuracy": accuracy_of(model, few, "long")}, "training": state,
            "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        record["long"]["exact_match"] = answers_of(model, few, tokens, "long")
        (fresh / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner only
        (fresh / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("accuracy", "exact_match", "long")}))


def opened(config: Config, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Loads what a run goes on from, finishes what a killed one had begun to replace, and returns the state.

    Raises:
        UsageError: checkpoints would lie in the folder that is replaced, or nothing is left to do.
        DataError: a folder holds something else.
    """
    if Path(config.out).resolve().is_relative_to(config.target.resolve()):
        raise UsageError(f"--export-to {str(config.target)!r} is replaced as a whole, so --out cannot be in it")
    if rank() == 0:
        check_folder(Path(config.out) / "checkpoint", *CHECKPOINT)
        check_folder(config.target, *EXPORTED)
    if dist.is_initialized():
        dist.barrier()
    state = restore(Path(config.out), model, optimizers)
    if state is not None and config.further:
        print(f"--further: going on with the checkpoint in {config.out}, not with the exported model")
    if state is None and config.further:
        state = restore_exported(config.target, model)
    if state is None and config.export:
        raise UsageError(f"no checkpoint in {config.out!r} to export; train first, or give the --out of the run")
    if state is not None and config.steps < state["step"] and not config.export:
        raise UsageError(
            f"the model has been trained for {state['step']} steps already; give --steps above that, or --export to write it"
        )
    return state or {"step": 0, "seconds": 0.0, "curve": []}


def main(config: Config) -> None:
    """Trains, or with `export` only writes what the last checkpoint holds."""
    torch.set_num_threads(config.threads)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if config.device.startswith("cuda") else "gloo")
    model = build_model(config).to(config.device)
    optimizers = build_optimizers(config, model)
    state = opened(config, model, optimizers)
    if state["step"] < config.steps and not config.export:
        facts = {"seeds": {"seed": config.seed}, "data_hash": testbed.fingerprint()}
        begun = {"goes_on": state["step"] > 0, "writes": rank() == 0}
        with Record(config.out, "pretrain", config.settings, **begun, **facts) as run:
            train(config, model, optimizers, state)
            run.add(log=state["curve"])
    if rank() == 0:
        export(config, state)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Returns the settings that a command line asks for."""
    return read_flags({"options": Config}, arguments, __doc__, smoke=SMOKE).of(Config)


if __name__ == "__main__":
    with told_in_one_line("run the same command again to go on from the last checkpoint"):
        main(parse())
