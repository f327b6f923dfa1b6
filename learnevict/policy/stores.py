"""What becomes of a slot that loses its place in full precision: it is dropped, or demoted to fewer bits first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from learnevict.config import parse_store
from learnevict.errors import UsageError
from learnevict.ops.quantise import BITS


class Store(ABC):
    """How the bytes of a budget are spent.

    Attributes:
        bits: of a number in the slots that are not in full precision; 0 if there are none.
    """

    bits: int = 0

    @abstractmethod
    def split(self, budget: int, floor: int, full: int, low: int) -> tuple[int, int]:
        """Returns slots in full precision and slots in few bits, per head, which together take the bytes of a budget.

        Args:
            budget: slots in full precision that the same bytes would hold.
            floor: slots that always are in full precision: guards, fresh block and one more.
            full, low: bytes of a slot of either kind, scales included.
        """


@dataclass(frozen=True)
class Drop(Store):
    """A slot that loses is gone; every slot is in full precision."""

    def split(self, budget: int, floor: int, full: int, low: int) -> tuple[int, int]:
        return budget, 0


@dataclass(frozen=True)
class Demote(Store):
    """A slot that loses its place in full precision is kept in few bits while the budget's bytes hold it, and then is gone.

    It never comes back to full precision, which is lost.

    Attributes:
        bits: 2, 4 or 8.
        share: of the budget that stays in full precision, below 1; guards and the fresh block do in any case.

    Raises:
        UsageError: other bits or another share.
    """

    bits: int = 4
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.bits not in BITS or not 0 <= self.share < 1:
            raise UsageError(
                f"slots can be held in 2, 4 or 8 bits beside a share of 0 up to below 1 in full precision, not in {self.bits} "
                f"beside {self.share}"
            )

    def split(self, budget: int, floor: int, full: int, low: int) -> tuple[int, int]:
        sharp = min(max(floor, int(self.share * budget)), budget)
        return sharp, max((budget - sharp) * full // low, budget - sharp)


def read_store(word: str | Store) -> Store:
    """Returns the store that "drop", "int4" or "50%+int4" means. Raises UsageError: anything else."""
    if isinstance(word, Store):
        return word
    share, bits = parse_store(word)
    return Demote(bits, share) if bits else Drop()
