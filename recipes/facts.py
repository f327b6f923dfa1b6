"""Chats to learn retention from: stretches of prose with facts of many forms between, as a user's message.

    python recipes/texts.py --source jargon --out runs/texts/jargon
    python recipes/facts.py --data runs/texts/jargon/train.jsonl --out runs/facts.jsonl
    learnevict train fast_kvzip --model smollm2 --data runs/facts.jsonl --target reconstruction

No fact has a form that `learnevict eval --tasks needle` hides, so a gate that keeps needles has not seen any; evaluate it on
other prose.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from learnevict.errors import DataError, UsageError, told_in_one_line
from learnevict.files import check, write
from learnevict.infer.prompts import checked, parse_row, read_lines
from learnevict.train.run.flags import check_fields, flag, read_flags

FIRST = "Anna Ben Clara David Elena Frank Greta Hugo Iris Jonas Karla Leon Mara Nils Olga Paul Rita Simon Tessa Viktor".split()
LAST = "Abel Berg Costa Dietz Ekman Foster Grant Hale Jensen Keller Lund Moreau Novak Ortiz Price Quinn Rossi Stone".split()
CITIES = (
    "Lisbon Oslo Prague Vienna Dublin Warsaw Athens Madrid Zagreb Tallinn Riga Geneva Lyon Turin Porto Ghent".split()
)
THINGS = ("boat", "painting", "old car", "violin", "carpet", "grey horse", "lamp", "telescope")
MARK = b'{"messages": '


@dataclass(frozen=True)
class Config:
    """Flags of this program."""

    data: str = flag("runs/texts/jargon/train.jsonl", "JSON lines of recipes/texts.py")
    out: str = flag("runs/facts.jsonl", "a file")
    chats: int = flag(400, "how many", least=1)
    fewest: int = flag(350, "words of a chat", least=20)
    most: int = flag(850, "words of a chat", least=20)
    facts: int = flag(8, "most facts in a chat", least=0)
    seed: int = flag(0, "of all draws", least=0)
    smoke: bool = flag(False, "seconds, the same code")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.fewest > self.most:
            raise UsageError(f"--fewest {self.fewest} is more than --most {self.most}; swap them")


def main(config: Config) -> None:
    """Writes the chats.

    Raises:
        DataError: the prose cannot be read, or is shorter than one chat.
    """
    check(Path(config.out), MARK)
    rows = [read_text(line, number, config.data) for number, line in enumerate(read_lines(Path(config.data)), 1)]
    sentences = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", " ".join(rows)).strip())
    lines: list[str] = []
    for index in range(config.chats):
        draw = random.Random(f"{config.seed} {index}")
        lines.append(json.dumps({"messages": [{"role": "user", "content": chat(draw, sentences, config)}]}) + "\n")
    write(Path(config.out), "".join(lines), MARK)
    print(f"{len(lines)} chats: {config.out}")


def read_text(line: bytes, number: int, source: str) -> str:
    """Returns the text of a line of JSON; a DataError if it has none."""
    try:
        found = parse_row(line).get("text") if line.strip() else ""
        if not isinstance(found, str):
            raise DataError('has no "text"')
    except DataError as error:
        raise DataError(f"line {number} of {source!r} {error}") from error
    return checked(found, f"line {number} of {source!r} ")


def chat(draw: random.Random, sentences: list[str], config: Config) -> str:
    """Returns consecutive sentences from a place drawn, with facts at places drawn."""
    wanted = draw.randint(config.fewest, config.most)
    start, taken, size = draw.randrange(len(sentences)), list[str](), 0
    while size < wanted:
        if len(taken) == len(sentences):
            raise DataError(f"{config.data} has {size} words, fewer than the {wanted} of one chat; give more prose")
        taken.append(sentences[(start + len(taken)) % len(sentences)])
        size += len(taken[-1].split())
    for _ in range(draw.randint(0, config.facts)):
        taken.insert(draw.randrange(len(taken) + 1), draw.choice(FORMS)(draw))
    return " ".join(taken)


def _name(draw: random.Random) -> str:
    return f"{draw.choice(FIRST)} {draw.choice(LAST)}"


FORMS: tuple[Callable[[random.Random], str], ...] = (
    lambda draw: f"The phone number of {_name(draw)} is {draw.randrange(100, 999)}-{draw.randrange(1000, 9999)}.",
    lambda draw: f"{_name(draw)} moved to {draw.choice(CITIES)} in {draw.randrange(1950, 2020)}.",
    lambda draw: (
        f"Train {draw.randrange(100, 999)} to {draw.choice(CITIES)} leaves at {draw.randrange(24)}:{draw.randrange(10, 60)}."
    ),
    lambda draw: f"Invoice number {draw.randrange(10_000, 99_999)} was sent to {_name(draw)}.",
    lambda draw: f"The room of {_name(draw)} in the {draw.choice(CITIES)} office is {draw.randrange(10, 999)}.",
    lambda draw: f"{_name(draw)} paid {draw.randrange(10, 9999)} euros for the {draw.choice(THINGS)}.",
    lambda draw: f"On {draw.choice(CITIES)} Street, house {draw.randrange(2, 400)} belongs to {_name(draw)}.",
    lambda draw: f"{_name(draw)} likes {draw.choice(THINGS)}s more than {_name(draw)} does.",
)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Reads the command line."""
    return read_flags({"chats": Config}, arguments, __doc__, smoke={"chats": 2}).of(Config)


if __name__ == "__main__":
    with told_in_one_line("run the same command again"):
        main(parse())
