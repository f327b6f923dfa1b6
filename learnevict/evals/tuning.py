"""Hyperparameters of the baselines, chosen on validation seeds by tools/results/tuning.py, per task family and budget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learnevict.errors import DataError, UsageError
from learnevict.hub import Gates, weight_hash

TABLES = ("lexical", "clausal")
"""Table baselines, which are tuned alike (their bonus for recency) but are learned, so never "the best heuristic"."""
TUNED = Path(__file__).parent / "tuned.json"


@dataclass(frozen=True)
class Tuned:
    """Settings that tuning found.

    Attributes:
        record: what they were tuned under: model, weights, tasks, settings, samples, and hashes of the tables that were tuned.
        settings: by family, budget and method.
        accuracy: step accuracy on validation under them, by family, budget and method.
    """

    record: dict[str, Any]
    settings: dict[str, dict[str, dict[str, dict[str, Any]]]]
    accuracy: dict[str, dict[str, dict[str, float]]]

    def best(self, family: str, budget: str) -> str:
        """Returns the training-free method that was best in a cell.

        Raises:
            UsageError: the cell was not tuned.
        """
        try:
            found = self.accuracy[family][budget]
        except KeyError as error:
            raise UsageError(f"{family} at {budget} was not tuned; tune it with recipes/evaluate.py") from error
        return max((name for name in found if name not in TABLES), key=lambda name: found[name])

    def known_best(self, family: str, budget: str) -> str | None:
        """Returns the same as `best`; None where a cell was not tuned."""
        return self.best(family, budget) if budget in self.accuracy.get(family, {}) else None

    def check(self, weights: str, gates: Mapping[str, Gates | None] | None = None) -> None:
        """Raises an error for settings tuned on another model, or with other tables.

        Args:
            weights: hash of the model's weights.
            gates: by method; those with tuned settings must be the ones that were tuned.

        Raises:
            UsageError: a hash is another.
        """
        if self.record.get("weights") != weights:
            raise UsageError(
                "the settings were tuned on other weights; drop --tuned, or run recipes/evaluate.py --stage tune"
            )
        tuned = {name: one for name, one in (gates or {}).items() if one is not None and self.of(name)}
        known = self.record.get("gates", {})
        if others := [name for name, one in tuned.items() if known.get(name) != weight_hash(one)]:
            raise UsageError(
                f"the settings of {', '.join(others)} were tuned with other gates than these; drop --tuned, or run "
                "recipes/evaluate.py --stage tune"
            )

    def of(self, method: str) -> dict[tuple[str, str], dict[str, Any]]:
        """Returns settings of one method by (family, budget)."""
        return {
            (family, budget): found[method]
            for family, by_budget in self.settings.items()
            for budget, found in by_budget.items()
            if found.get(method)
        }


def load(path: Path = TUNED) -> Tuned:
    """Returns what `save` wrote.

    Raises:
        DataError: no such file, or something else.
    """
    try:
        return Tuned(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{str(path)!r} holds no tuned settings; make them with recipes/evaluate.py --stage tune"
        ) from error
