"""Fit the lexical baseline and tune its recency bonus on validation seeds.

    python recipes/lexical.py --output_dir learnevict/gates/testbed-lexical

The baseline scores a token by the mean golden label of its token id, per layer and head, plus a bonus for recency. A learned
policy that does not beat it has learned words, not context.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from learnevict.evals.contenders import COMPARISON, contender
from learnevict.evals.plan import Plan, Subject
from learnevict.evals.suite import run
from learnevict.testbed.corpus import load_base, read_source
from learnevict.train.lexical import fit_lexical
from learnevict.train.ranker import Collator

BONUSES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)


def main(out: Path, documents: int, samples: int) -> None:
    """Fit on training seeds, choose the bonus by step accuracy on validation seeds, save."""
    model, tokenizer = load_base("testbed")
    texts = read_source("testbed", tokenizer, documents, 4096)
    collate = Collator(tokenizer.pad_token_id)
    batches = [collate(texts[start : start + 16]) for start in range(0, len(texts), 16)]
    gates = fit_lexical(model, ((b["input_ids"], b["attention_mask"]) for b in batches), block=COMPARISON.block)
    plan = Plan(budgets=("1/4", "1/8"), num_samples=samples, split="validation", free="none")
    tried = {}
    for bonus in BONUSES:
        gates.gate.bonus.fill_(bonus)
        rows, _ = run(plan, Subject(model, tokenizer), [contender("lexical", gates)])
        tried[bonus] = sum(row["step_accuracy"] for row in rows) / len(rows)
        print(f"bonus {bonus}: step accuracy {tried[bonus]:.4f}")
    gates.gate.bonus.fill_(max(tried, key=lambda bonus: tried[bonus]))
    gates.config.training = {"documents": documents, "validation": {str(k): round(v, 4) for k, v in tried.items()}}
    gates.save_pretrained(out)
    print(json.dumps(gates.config.training))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/lexical"))
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=40)
    given = parser.parse_args()
    main(given.output_dir, given.documents, given.samples)
