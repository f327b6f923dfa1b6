"""The testbed: five seeded task families and a small reasoning model trained on them, for measuring eviction.

Every family mixes true statements with decoys that use the same words and contradict them; only the first word of a
statement tells them apart. A policy that knows words but not their context keeps the wrong half.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

from learnevict.errors import UsageError
from learnevict.testbed import dialogue, ledger, procedure, program, recall
from learnevict.testbed.clauses import Sample, assemble, final_answer
from learnevict.testbed.vocabulary import build_tokenizer, unknown_words

__all__ = [
    "FAMILIES",
    "Sample",
    "build_tokenizer",
    "families_of",
    "fingerprint",
    "generate",
    "load",
    "path",
    "unknown_words",
    "verify",
]

_MODULES = {"program": program, "ledger": ledger, "recall": recall, "procedure": procedure, "dialogue": dialogue}
FAMILIES = tuple(_MODULES)
SPLITS = ("train", "validation", "test")
NUM_LEVELS = 5


def families_of(text: str) -> tuple[str, ...]:
    """Returns families of the testbed named between commas, as often as each is named; all, if none is."""
    names = tuple(part.strip() for part in text.split(",") if part.strip()) or FAMILIES
    if unknown := [name for name in names if name not in FAMILIES]:
        raise UsageError(f"no such task family: {', '.join(unknown)}; choose from {', '.join(FAMILIES)}")
    return names


def generate(
    family: str, seed: int, *, split: str = "test", length: str = "normal", level: int | None = None
) -> Sample:
    """Returns the sample of this family, seed and split; `length="long"` extrapolates, `level` 0 to 4 is the curriculum.

    Splits are disjoint because the split's name is part of what seeds the random numbers.
    Raises UsageError for a family, split, length or level that does not exist.
    """
    if (
        family not in _MODULES
        or split not in SPLITS
        or length not in ("normal", "long")
        or level not in (None, *range(NUM_LEVELS))
    ):
        given = f"family={family!r}, split={split!r}, length={length!r}, level={level!r}"
        raise UsageError(
            f"no such sample: {given}; families are {FAMILIES}, splits {SPLITS}, lengths normal and long, levels 0 to 4"
        )
    module = _MODULES[family]
    chosen = module.LONG if length == "long" else module.LEVELS[NUM_LEVELS - 1 if level is None else level]
    key = f"{family}/{split}/{length}/{level}/{seed}".encode()
    rng = Random(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
    return assemble(family, seed, split, module.generate(rng, chosen))


def verify(sample: Sample, text: str) -> bool:
    """Returns whether the text, a generated response with or without its prompt, ends with the sample's answer."""
    return final_answer(text.removeprefix(sample.prompt)) == sample.answer


def fingerprint() -> str:
    """Returns a sha256 of fixed samples of every family, split and length; it changes whenever a generator or a word does."""
    digest = hashlib.sha256()
    for family in FAMILIES:
        for split in SPLITS:
            for seed in range(4):
                for length in ("normal", "long"):
                    sample = generate(family, seed, split=split, length=length)
                    digest.update(json.dumps([sample.text, sample.answer_mask, sample.weights]).encode())
    return digest.hexdigest()


def path() -> Path:
    """Returns the folder of the bundled model, tokenizer and training record: a valid `from_pretrained` argument."""
    return Path(__file__).parent / "data"


def load(dtype: Any = None, device: Any = None) -> tuple[Any, Any]:
    """Returns the bundled model in eval mode (float32 unless told otherwise; stored as bfloat16) and its tokenizer."""
    from learnevict.infer.load import load as load_model

    model: Any
    model, tokenizer = load_model(str(path()), device="cpu", dtype="fp32")
    return model.to(device or "cpu", dtype), tokenizer
