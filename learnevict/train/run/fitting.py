"""Defaults that fit the texts: those of the programs are meant for the testbed's, of some 350 tokens.

    period         the power of two nearest to the testbed's 16, as the median text is longer: 8 to 128
    budgets        longer likewise, and never below guards, a fresh block and one slot
    window         of soft gates, as the period
    eval_budgets   25%
    max_length     no more than the model has positions for, the repetition of a chunk included

What the command line, a file of flags or gates that are trained further say, holds.
"""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from learnevict.data.label_store import LabelStore
from learnevict.data.opening import TESTBED, read_for_learning
from learnevict.data.sources import Source
from learnevict.hub import Gates
from learnevict.policy import Guard

USUAL = 350
"""Tokens of a text of the testbed."""
SAMPLE = 64
"""Texts whose length is looked at."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the median and of the longest text, of so many."""

    median: int
    longest: int
    number: int


def source_of(common: Any) -> Source:
    """Returns the texts that a program's flags name."""
    return Source(
        common.data, common.data_config, common.data_split, common.column, common.max_length, common.packed, common.streaming
    )  # fmt: skip


def fit(flags: Any, described: PreTrainedConfig, tokenizer: Any) -> Lengths | None:
    """Sets what was not given to what fits the texts, and says so; returns their lengths, None for the testbed's.

    Args:
        flags: learnevict.train.run.setup.Arguments, changed in place.
        described: the configuration of the base.
        tokenizer: of the base.
    """
    common, method = flags.common, flags.trainable_method
    store = LabelStore(Path(common.labels)) if common.labels else None
    if (common.data if store is None else store.manifest.data) == TESTBED:
        return None
    own = Gates.load(common.start_from).config.settings if common.start_from else {}
    given = flags.given | {name for name, value in own.items() if value is not None}
    _limit(flags, described)
    lengths = measured(common, store, tokenizer)
    ratio = lengths.median / USUAL
    period = own.get("period") or common.period
    if "period" not in given:
        period = 2 ** min(max(round(math.log2(16 * ratio)), 3), 7)
        if store is not None and not store.manifest.repetition:  # labels of blocks
            period = store.manifest.block
    usual = {one.name: method.defaults.get(one.name, one.default) for one in fields(flags.mode)}
    changes: dict[str, Any] = {"period": period} if "period" in usual else {}
    if "budgets" in usual and "budgets" not in given:
        least = Guard(common.sinks, common.recent).reserved(period) + 1 if changes else 1
        changes["budgets"] = tuple(max(round(budget * ratio), least) for budget in usual["budgets"])
    flags.mode, common.period = replace(flags.mode, **changes), period
    windows = {"period", "window"} if method.mode == "soft" else {"period"}
    for name in (windows & flags.settings.keys()) - given:
        flags.settings[name] = period
    if "eval_budgets" not in given:
        common.eval_budgets = ["25%"]
    if flags.training.process_index == 0:
        said = ", ".join(f"{name} {value}" for name, value in {"period": period, **changes}.items())
        sys.stdout.write(f"texts of {lengths.median} tokens (the median of {lengths.number}): {said}\n")
    return lengths


def measured(common: Any, store: LabelStore | None, tokenizer: Any) -> Lengths:
    """Returns the lengths of the first texts, or of those of a label store."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever reads all of them warns
        if store is not None:
            sizes = store.lengths()
        else:
            found = read_for_learning(source_of(common), tokenizer, min(SAMPLE, common.documents), 0)[0]
            sizes = [len(one.input_ids) for one in found]
    sizes.sort()
    return Lengths(sizes[len(sizes) // 2], sizes[-1], len(sizes))


def _limit(flags: Any, described: PreTrainedConfig) -> None:
    """Lowers max_length, unless it is given, to the positions that the model has."""
    positions = getattr(described.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is None or "max_length" in flags.given:
        return
    again = flags.mode.chunk + 64 if getattr(flags.mode, "target", "") == "reconstruction" else 0
    flags.common.max_length = max(min(flags.common.max_length, positions - again), positions // 2)
