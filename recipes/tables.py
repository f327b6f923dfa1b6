"""Fits the table baselines, lexical and clausal, and tunes their recency bonus on validation seeds.

    python recipes/tables.py --output_dir runs/tables

They score a token by the mean golden label of its token id, or of its place in a clause that begins with a certain word, per
layer and head, plus a bonus for recency. A learned policy that does not beat the first has learned words, not context; one
that does not beat the second has learned no context beyond a clause.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.cli.output import progress
from learnevict.data.documents import Collator
from learnevict.data.label_store import hash_documents
from learnevict.data.opening import load_base, read_source
from learnevict.errors import UsageError, told_in_one_line
from learnevict.evals.methods import COMPARISON, evaluated_method
from learnevict.evals.plan import EvaluatedModel, Plan, count
from learnevict.evals.suite import run
from learnevict.evals.tasks import family_tasks
from learnevict.hub import Gates, weight_hash
from learnevict.hub.run_record import Record, own_record
from learnevict.oracle import golden_labels
from learnevict.train.run.flags import check_fields, flag, read_flags
from learnevict.train.trainers.replay_states import look_ahead
from tools.results.tuning import BONUSES

SEPARATOR = ";"
SMOKE = {"output_dir": "runs/tables-smoke", "documents": 32, "samples": 2}


@dataclass(frozen=True)
class Config:
    """Flags of this program."""

    output_dir: str = flag("runs/tables", "a folder per baseline")
    documents: int = flag(2000, "to fit on")
    samples: int = flag(40, "of each family, to tune on")
    smoke: bool = flag(False, "seconds, the same code")

    def __post_init__(self) -> None:
        check_fields(self)


def main(config: Config) -> None:
    """Fits on training seeds, chooses bonuses by step accuracy on validation seeds, and saves the gates."""
    out, told = Path(config.output_dir), {"documents": config.documents, "samples": config.samples}
    if any(out.glob("testbed-*")) and (own_record(out, "tables") or {}).get("config") != told:
        raise UsageError(f"{str(out)!r} holds tables of another run; choose another --output_dir")
    model, tokenizer = load_base("testbed")
    texts = read_source("testbed", tokenizer, config.documents)
    with Record(out, "tables", told, base_hash=weight_hash(model), data_hash=hash_documents(texts)) as record:
        collate = Collator(tokenizer.pad_token_id)
        batches = (collate(texts[start : start + 16]) for start in range(0, len(texts), 16))
        separator = tokenizer.get_vocab()[SEPARATOR]
        found = [Gates.make("lexical", model), Gates.make("clausal", model, separator=separator)]
        fit_tables(model, ((b["input_ids"], b["attention_mask"]) for b in batches), found, COMPARISON.block)
        tasks = family_tasks(split="validation")
        plan = Plan(tasks, budgets=("1/4", "1/8"), num_samples=config.samples, free="none", oracle=False)
        for gates in found:
            tried = tune(gates, plan, EvaluatedModel(model, tokenizer))
            gates.config.training = {**record.origin, "validation": {str(k): round(v, 4) for k, v in tried.items()}}
            gates.save_pretrained(out / f"testbed-{gates.method}")
            record.add(**{gates.method: gates.config.training["validation"]})


@torch.no_grad()
def fit_tables(
    model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]], gates: list[Gates], block: int
) -> None:
    """Sets each entry of the gates' tables to the mean, over a training set, of the largest label after a token's own block.

    Args:
        batches: (input_ids, attention_mask) pairs, int64 [B, T].
        gates: of methods whose gate has a `table` [L, H, entries] and tells the `entries` of a text; filled in place.
        block: event period.
    """
    fitted: list[Any] = [one.gate for one in gates]
    tables = [torch.zeros_like(one.table) for one in fitted]
    counts = [torch.zeros(table.shape[-1]) for table in tables]
    for input_ids, mask in batches:
        labels, _ = golden_labels(model, input_ids, mask, block=block)
        unpadded = (mask.cumsum(-1) - 1).clamp_min(0)
        real = mask.bool()
        entries = [one.entries(input_ids, mask)[real] for one in fitted]
        for entry, total in zip(entries, counts, strict=True):
            total += torch.bincount(entry, minlength=len(total)).float()
        for layer, part in enumerate(labels):
            if part is None:
                continue
            ahead = look_ahead(part)
            index = (unpadded // block + 1).clamp_max(ahead.shape[-1] - 1)
            target = ahead.gather(-1, index[:, None, :, None].expand(*ahead.shape[:3], 1)).squeeze(-1)
            for head in range(target.shape[1]):
                for entry, table in zip(entries, tables, strict=True):
                    table[layer, head].index_add_(0, entry, target[:, head][real])
    for one, table, total in zip(fitted, tables, counts, strict=True):
        one.table.copy_(table / total.clamp_min(1))


def tune(gates: Gates, plan: Plan, subject: EvaluatedModel) -> dict[float, float]:
    """Sets the bonus that does best, and returns the step accuracy of each."""
    tried: dict[float, float] = {}
    field = [evaluated_method(gates.method, gates)]
    with progress(len(BONUSES) * count(plan, field)) as advance:
        for bonus in BONUSES:
            gates.gate.bonus.fill_(bonus)
            rows, _ = run(plan, subject, field, advance=advance)
            tried[bonus] = sum(row["step_accuracy"] for row in rows) / len(rows)
            print(f"{gates.method}, bonus {bonus}: step accuracy {tried[bonus]:.4f}")
    gates.gate.bonus.fill_(max(tried, key=lambda bonus: tried[bonus]))
    return tried


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Returns the settings that a command line asks for."""
    return read_flags({"options": Config}, arguments, __doc__, smoke=SMOKE).of(Config)


if __name__ == "__main__":
    with told_in_one_line("nothing was saved of the baseline being tuned; run the same command again"):
        main(parse())
