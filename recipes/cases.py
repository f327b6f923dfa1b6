"""Chats to learn retention from: bookkeeping cases (learnevict.testbed.entries) with their worked responses.

    learnevict model get smollm2-reasoning
    python recipes/cases.py --out runs/cases.jsonl
    learnevict oracle --model smollm2-reasoning --data runs/cases.jsonl --states --out runs/labels

They are of the split "train" and of full size, with seeds that no default of recipes/adapt.py reaches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from learnevict.errors import told_in_one_line
from learnevict.files import check, write
from learnevict.testbed.entries import FAMILIES, generate
from learnevict.train.run.flags import check_fields, flag, read_flags

MARK = b'{"messages": '


@dataclass(frozen=True)
class Config:
    """Flags of this program."""

    out: str = flag("runs/cases.jsonl", "a file")
    cases: int = flag(200, "how many, the families in turn", least=1)
    first: int = flag(500_000, "seed of the first", least=0)
    smoke: bool = flag(False, "seconds, the same code")

    def __post_init__(self) -> None:
        check_fields(self)


def main(config: Config) -> None:
    """Writes the chats. Raises DataError: the file cannot be written, or is another program's."""
    check(Path(config.out), MARK)
    names, lines = list(FAMILIES), list[str]()
    for place in range(config.cases):
        case = generate(names[place % len(names)], config.first + place, split="train")
        said = [{"role": "user", "content": case.prompt}, {"role": "assistant", "content": case.response}]
        lines.append(json.dumps({"messages": said}) + "\n")
    write(Path(config.out), "".join(lines), MARK)
    print(f"{len(lines)} cases: {config.out}")


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Reads the command line."""
    return read_flags({"cases": Config}, arguments, __doc__, smoke={"cases": 2}).of(Config)


if __name__ == "__main__":
    with told_in_one_line("run the same command again"):
        main(parse())
