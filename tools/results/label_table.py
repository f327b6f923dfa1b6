"""The file of what recipes/compare_labels.py has measured, and the table made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from learnevict.errors import DataError, UsageError
from learnevict.evals import metrics
from learnevict.evals.report import table
from learnevict.evals.teacher_forced import Columns
from learnevict.files import write

REFERENCE = "golden"


@dataclass
class Tried:
    """One label on one family at one budget: answer-mask tokens right and seen, by sample, and summed losses of responses."""

    family: str
    share: str
    slots: int
    name: str
    right: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    loss: float = 0.0
    full_loss: float = 0.0
    seconds: float = 0.0

    def add(self, scores: Columns, full: Sequence[float], seconds: float) -> None:
        """Adds a batch: scores under the label's trace, and the losses with the full cache."""
        self.right += scores["right"]
        self.seen += scores["seen"]
        self.loss += sum(scores["loss"])
        self.full_loss += sum(full)
        self.seconds += seconds

    @property
    def accuracy(self) -> float:
        """Returns the step accuracy."""
        return sum(self.right) / sum(self.seen)

    @property
    def loss_ratio(self) -> float:
        """Loss over that with the full cache."""
        return self.loss / self.full_loss


@dataclass(frozen=True)
class TriedLabels:
    """A file of labels that were tried."""

    path: Path
    origin: dict[str, Any]
    tried: list[Tried] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, origin: Mapping[str, Any] | None = None) -> TriedLabels:
        """Reads what a file holds; nothing if it is not there.

        Raises:
            DataError: something else is in it.
            UsageError: it belongs to another origin (weights, tasks, samples).
        """
        if not path.exists() and origin is not None:
            return cls(path, dict(origin))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = cls(path, content["origin"], [Tried(**one) for one in content["tried"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{str(path)!r} holds no comparison of labels; choose another --out") from error
        if origin is not None and found.origin != dict(origin):
            raise UsageError(f"{path} was made with {found.origin}, not {dict(origin)}; choose another --out")
        return found

    def has(self, family: str, share: str, name: str) -> bool:
        """Returns whether a label was tried there."""
        return any((one.family, one.share, one.name) == (family, share, name) for one in self.tried)

    def add(self, one: Tried) -> None:
        """Writes one more, at once."""
        self.tried.append(one)
        content = {"origin": self.origin, "tried": [asdict(one) for one in self.tried]}
        lines = json.dumps(content).replace('{"family"', '\n{"family"')
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path, lines + "\n", b'{"origin": ')


def label_tables(found: TriedLabels) -> list[str]:
    """Returns a table: labels down, families and budgets across."""
    families = list(dict.fromkeys(one.family for one in found.tried))
    largest = sorted(found.tried, key=lambda one: (families.index(one.family), -one.slots))
    cells = list(dict.fromkeys((one.family, one.share) for one in largest))
    places = {(one.family, one.share, one.name): one for one in found.tried}

    def shown(name: str, family: str, share: str) -> str:
        one, base = places.get((family, share, name)), places.get((family, share, REFERENCE))
        if one is None:
            return "–"
        sign = ""
        if base is not None:
            apart = metrics.paired_difference(one.right, base.right, one.seen)
            sign = " +" if apart.low > 0 else " -" if apart.high < 0 else ""
        return f"{one.accuracy:.3f}{sign} ({one.loss_ratio:.3g})"

    names = dict.fromkeys(one.name for one in found.tried)
    return [
        "## Labels",
        f"Step accuracy of traces made with hindsight, {found.origin['samples']} {found.origin['split']} samples each, and the "
        "loss over that with the full cache; all hold as many slots in all. + or -: the paired 95 % interval of the difference "
        "from golden lies above or below zero. recipes/compare_labels.py says what the names mean.",
        table(
            ["label", *(f"{family} {share}" for family, share in cells)],
            [[name.replace("|", "\\|"), *(shown(name, *cell) for cell in cells)] for name in names],
        ),
    ]
