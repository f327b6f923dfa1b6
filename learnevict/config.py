"""Budgets (how much a policy may hold) and layouts (the shape of a base model's cache)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from learnevict.errors import BudgetError, UsageError

BYTE_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
EXAMPLES = 'an int (tokens), "25%" or "1/4" (share of the tokens seen) or "64MiB" (keys and values of one row)'
MOST_TOKENS = 2**28
"""More than any text has, and few enough that sums of some of them fit into int32."""


@dataclass(frozen=True)
class Layout:
    """Shape of a base model's cache, and of every gate made for it."""

    num_layers: int
    num_heads: int
    num_query_heads: int
    head_dim: int
    value_dim: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class Base:
    """The model a gate was trained for; `attach` refuses another.

    Attributes:
        layout: shape of its cache.
        weights: fingerprint of its weights; empty if unknown.
        name: what to call it.
        allow_other: accept other weights of the same shape.
    """

    layout: Layout
    weights: str = ""
    name: str = ""
    allow_other: bool = False


@dataclass(frozen=True)
class Budget:
    """Slots held per (layer, row, kv head) after an eviction event, guards and fresh block included.

    `unit` is "tokens" (amount is a count), "share" (amount in (0, 1] of the row's tokens, resolved at each event) or
    "bytes" (keys and values of one row over all evicting layers, slack included). What is beyond MOST_TOKENS keeps all.
    """

    amount: float
    unit: Literal["tokens", "share", "bytes"] = "tokens"

    @classmethod
    def parse(cls, text: AnyBudget) -> Budget:
        """Reads 512, "512", "25%", "1/4" or "64MiB".

        Raises:
            BudgetError: anything else, or an amount that is not positive.
        """
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[A-Za-z]*|/\s*[0-9]+)\s*", str(text))
        if match is None:
            raise BudgetError(f"budget {text!r:.80} is not understood; give {EXAMPLES}")
        number, unit = min(float(match[1]), 2.0**99), match[2].upper()
        if unit.startswith("/") and 0 < number <= (whole := min(float(unit[1:]), 2.0**99)):
            return cls(number / whole, "share")
        if unit == "%" and 0 < number <= 100:
            return cls(number / 100, "share")
        if unit in BYTE_UNITS and number > 0:
            return cls(number * BYTE_UNITS[unit], "bytes")
        if unit == "" and number >= 1 and number == int(number):
            return cls(min(int(number), MOST_TOKENS))
        raise BudgetError(f"budget {text!r:.80} is out of range; give {EXAMPLES}")

    def tokens(self, seen: int, floor: int, row_bytes_per_token: int, num_layers: int, reserve: int) -> int:
        """Returns slots per (layer, kv head).

        Args:
            seen: tokens the row has seen (used by shares).
            floor: smallest budget a share may shrink to (guards + block).
            row_bytes_per_token: bytes of K and V of one token in all heads of one layer, summed over evicting layers.
            num_layers: evicting layers; only used to word the error.
            reserve: slots held on top of the budget between events (slack).
        """
        if self.unit == "share":
            return max(math.ceil(round(self.amount * seen, 9)), floor)  # 7 % of 100 is 7, not 8
        if self.unit == "tokens":
            return min(int(self.amount), MOST_TOKENS)
        slots = int(self.amount // row_bytes_per_token) - reserve
        if slots < floor:
            need = (floor + reserve) * row_bytes_per_token
            raise BudgetError(
                f"{int(self.amount)} bytes hold {max(slots + reserve, 0)} tokens in {num_layers} layers, but guards, fresh "
                f"block, slack and a protected prompt take {floor + reserve}; give at least {need} bytes"
            )
        return min(slots, MOST_TOKENS)

    def __str__(self) -> str:
        if self.unit == "share":
            return f"{self.amount:.4g}".rstrip("0") if self.amount > 1 else f"{100 * self.amount:.4g}%"
        return str(int(self.amount)) if self.unit == "tokens" else f"{int(self.amount)}B"


AnyBudget: TypeAlias = int | str | Budget
"""What `Budget.parse` reads."""


def readable_bytes(num_bytes: float) -> str:
    """Returns bytes for reading: 512 B, 640.0 KiB, 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def parse_store(word: str) -> tuple[float, int]:
    """Returns the share of a budget in full precision and the bits of the rest; bits 0 for "drop".

    Raises:
        UsageError: the word is neither "drop" nor one such as "int4" or "50%+int4".
    """
    found = re.fullmatch(r"(?:(\d{1,2}(?:\.\d+)?)%\+)?int([248])", str(word))
    if word != "drop" and found is None:
        raise UsageError(
            f"store {word!r:.80} is unknown; give drop, int8, int4, int2, or a share in full precision and the rest in few "
            "bits, such as 50%+int4"
        )
    return (1.0, 0) if found is None else (float(found[1] or 0) / 100, int(found[2]))
