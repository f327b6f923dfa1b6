"""Teaches a pretrained model by LoRA to work out bookkeeping cases (learnevict.testbed.entries) step by step.

    learnevict model get smollm2
    python recipes/adapt.py --model smollm2 --output_dir runs/adapter     # an hour on two cores
    python recipes/adapt.py --smoke                                       # seconds, the same code

LoRA (Hu et al. 2021, arXiv 2106.09685) on all projections, by TRL's SFTTrainer; the loss counts responses only. Small cases
come first, then cases of full size, all drawn from the split "train". A killed run resumes from its last checkpoint with the
same command. Into --output_dir go an adapter of peft in bfloat16 and, in its folder `model`, the model with the adapter merged:

    learnevict eval --model runs/adapter/model --tasks accounts,moves --methods full,random,snapkv
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from learnevict.data.opening import load_base
from learnevict.errors import UsageError, told_in_one_line
from learnevict.hub import weight_hash
from learnevict.hub.run_record import Record, own_record
from learnevict.testbed.entries import FAMILIES, generate
from learnevict.train.run.flags import check_fields, flag, read_flags

SMOKE = {"output_dir": "runs/adapter-smoke", "small": 1, "medium": 0, "normal": 1, "batch_size": 1, "model": "testbed"}


@dataclass(frozen=True)
class Config:
    """Flags of this program."""

    model: str = flag("smollm2", "a folder, a Hub id or a name of `learnevict model list`")
    output_dir: str = flag("runs/adapter", "a folder")
    small: int = flag(150, "steps on small cases, which come first", least=0)
    medium: int = flag(160, "steps on cases of as many entries as the full size has, with fewer remarks", least=0)
    normal: int = flag(120, "steps on cases of full size", least=0)
    batch_size: int = flag(4, "cases of a step")
    rank: int = flag(12, "of the adapter's matrices")
    learning_rate: float = flag(1e-3, "at its highest; it rises over 10 steps and falls to 0 in a straight line")
    bf16: bool = flag(True, "multiplies matrices in bfloat16, faster where the processor has it")
    save_steps: int = flag(40, "between checkpoints")
    seed: int = flag(0, "of the adapter's first weights and of the cases", least=0)
    smoke: bool = flag(False, "seconds, the same code")

    def __post_init__(self) -> None:
        check_fields(self)


def main(config: Config) -> None:
    """Trains the adapter and saves it, with the merged model.

    Raises:
        UsageError, DataError: the folder holds another run, or files that this program did not write.
    """
    refuse_others(config)
    model, tokenizer = load_base(config.model)
    cases = Dataset.from_list([as_chat(row) for row in drawn(config)])
    lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = SFTConfig(
        output_dir=config.output_dir, max_steps=config.small + config.medium + config.normal, seed=config.seed,
        per_device_train_batch_size=config.batch_size, train_sampling_strategy="sequential",
        learning_rate=config.learning_rate, lr_scheduler_type="linear", warmup_steps=10, weight_decay=0.0,
        max_length=None, gradient_checkpointing=False, bf16=config.bf16, logging_steps=10,
        save_steps=config.save_steps, save_total_limit=1, report_to="none", use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    found = get_last_checkpoint(config.output_dir) if Path(config.output_dir).is_dir() else None
    with Record(config.output_dir, "adapt", vars(config), base_hash=weight_hash(model), goes_on=bool(found)) as record:
        trainer = SFTTrainer(model, arguments, train_dataset=cases, processing_class=tokenizer, peft_config=lora)
        trainer.train(resume_from_checkpoint=found)
        adapted: Any = trainer.model
        adapted.peft_config["default"].base_model_name_or_path = config.model
        rounded = {name: value.to(torch.bfloat16) for name, value in get_peft_model_state_dict(adapted).items()}
        adapted.save_pretrained(config.output_dir, state_dict=rounded)
        set_peft_model_state_dict(adapted, rounded)
        merged = adapted.merge_and_unload()
        merged.save_pretrained(Path(config.output_dir) / "model")
        tokenizer.save_pretrained(Path(config.output_dir) / "model")
        record.add(log=trainer.state.log_history)


def refuse_others(config: Config) -> None:
    """Raises an error if the folder holds anything but a run with the same settings, before a model is opened."""
    out = Path(config.output_dir)
    before = own_record(out, "adapt")
    if before is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{config.output_dir!r} holds what this program did not write; choose another --output_dir")
    told = {name: value for name, value in vars(config).items() if name != "output_dir"}
    if before is not None and told != {name: value for name, value in before["config"].items() if name != "output_dir"}:
        raise UsageError(f"{config.output_dir!r} holds a run with other settings; choose another --output_dir")


def drawn(config: Config) -> list[tuple[str, int, str]]:
    """Returns family, seed and size of every case, in the order of training: the families take turns."""
    steps = {"small": config.small, "medium": config.medium, "normal": config.normal}
    sizes = [size for size, number in steps.items() for _ in range(number * config.batch_size)]
    first = config.seed * 1_000_000
    return [(list(FAMILIES)[place % len(FAMILIES)], first + place, size) for place, size in enumerate(sizes)]


def as_chat(row: tuple[str, int, str]) -> dict[str, list[dict[str, str]]]:
    """Returns a case as TRL's prompt and completion."""
    family, seed, size = row
    case = generate(family, seed, split="train", size=size)
    return {
        "prompt": [{"role": "user", "content": case.prompt}],
        "completion": [{"role": "assistant", "content": case.response}],
    }


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Returns the settings that a command line asks for."""
    return read_flags({"options": Config}, arguments, __doc__, smoke=SMOKE).of(Config)


if __name__ == "__main__":
    with told_in_one_line("run the same command again; it goes on from the last checkpoint"):
        main(parse())
