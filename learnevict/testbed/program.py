"""Family program: straight-line arithmetic modulo 10, lines in any order, next to lines that must be skipped.

set A 3 ; old A 7 ; do L4 A + B = C ; skip L4 D - B = C ; ... run L3 to L9 ; ask C F ;
-> L3 D 1 - A 3 = F 8 ; L4 A 3 + B 5 = C 8 ; ... answer C 8 F 8
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from learnevict.testbed.clauses import Level, another, filler, scatter
from learnevict.testbed.vocabulary import DIGITS, FALSE_FACT, FALSE_LINE, LABELS, TRUE_FACT, TRUE_LINE, VARIABLES

LEVELS = (
    Level((2, 3), 0.0, (0, 0), chatter=False),
    Level((3, 4), 0.8, (0, 0), chatter=False),
    Level((4, 7), 1.0, (0, 20)),
    Level((5, 8), 1.0, (20, 70)),
    Level((6, 8), 1.0, (65, 105)),
)
LONG = Level((10, 12), 1.0, (100, 140))


@dataclass(frozen=True)
class Instruction:
    """`left sign right = target`, the instruction behind one label."""

    left: str
    sign: str
    right: str
    target: str

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.target}"


def compute(left: int, sign: str, right: int) -> int:
    """Returns the sum or difference modulo 10."""
    return (left + right if sign == "+" else left - right) % 10


def chatter(digit: int, *names: str) -> str:
    """Returns a remark that depends on nothing but the step before it, so that greedy text is the reference text."""
    first, last = names[0], names[-1]
    remarks = {
        1: f" so {first} and {last} look fine ;",
        3: f" see page {(digit + 1) % 10} of {(digit + 3) % 10} ;",
        4: f" double check {last} near {first} ;",
        6: f" compare {first} {(digit + 2) % 10} with {last} {(digit + 3) % 10} ;",
        8: f" hm , page {digit - 5} again ;",
        9: f" next to {last} was {first} ;",
    }
    return remarks.get(digit, "")


def generate(rng: Random, level: Level) -> list[tuple[str, str]]:
    """Returns one program as chat turns; words of the answer mask carry a "?"."""
    num_lines = level.num_items(rng)
    pool = rng.sample(VARIABLES, 12)
    start = {name: rng.randint(0, 9) for name in pool[: max(2, num_lines - rng.randint(1, 2))]}
    lines = _write_lines(rng, num_lines, list(start), pool)
    first = rng.randint(0, len(LABELS) - num_lines)
    labels = LABELS[first : first + num_lines]
    asked = _choose_asked(rng, lines)
    prompt = _prompt(rng, level, start, dict(zip(labels, lines, strict=True)), pool)
    prompt += f" run {labels[0]} to {labels[-1]} ; ask {' '.join(asked)} ;"
    values, steps = dict(start), []
    for label, line in zip(labels, lines, strict=True):
        left, right = values[line.left], values[line.right]
        result = values[line.target] = compute(left, line.sign, right)
        step = f"{label} ?{line.left} ?{left} {line.sign} ?{line.right} ?{right} = ?{line.target} ?{result} ;"
        steps.append(step + (chatter(result, line.left, line.right, line.target) if level.chatter else ""))
    answer = " ".join(f"{name} ?{values[name]}" for name in asked)
    return [("user", prompt), ("assistant", f"{' '.join(steps)} answer {answer}")]


def _write_lines(rng: Random, num_lines: int, known: list[str], pool: list[str]) -> list[Instruction]:
    """Returns lines that use most variables: those not read yet are preferred as operands, half of the targets overwrite."""
    unread, lines = list(known), []
    for _ in range(num_lines):
        operands: list[str] = []
        for _ in range(2):
            choices = [name for name in unread if name not in operands]
            if not choices or rng.random() < 0.3:
                choices = [name for name in known if name not in operands]
            operands.append(rng.choice(choices))
        fresh = [name for name in pool if name not in known]
        target = rng.choice(fresh) if fresh and rng.random() < 0.4 else rng.choice(known)
        known = known + [target] * (target not in known)
        unread = [name for name in unread if name not in operands and name != target] + [target]
        lines.append(Instruction(operands[0], rng.choice("+-"), operands[1], target))
    return lines


def _choose_asked(rng: Random, lines: list[Instruction]) -> list[str]:
    """Returns two computed variables if there are two, among the later ones."""
    computed = list(dict.fromkeys(line.target for line in reversed(lines)))[:4]
    return rng.sample(computed, min(2, len(computed)))


def _prompt(rng: Random, level: Level, start: dict[str, int], lines: dict[str, Instruction], pool: list[str]) -> str:
    """Returns settings, then lines, each among conflicting decoys, with filler everywhere."""
    settings = [f"{rng.choice(TRUE_FACT)} {name} {value} ;" for name, value in start.items()]
    conflicting = rng.sample(list(start), min(len(start), level.num_decoys(rng, len(start))))
    for name in conflicting:
        settings.append(f"{rng.choice(FALSE_FACT)} {name} {another(rng, DIGITS, str(start[name]))} ;")
    if conflicting:
        settings.append(f"{rng.choice(FALSE_FACT)} {rng.choice(pool)} {{}} ;")
        name = settings[-1].split()[1]
        settings[-1] = settings[-1].format(another(rng, DIGITS, str(start.get(name))))
    program = [f"{rng.choice(TRUE_LINE)} {label} {line} ;" for label, line in lines.items()]
    for label in rng.sample(list(lines), min(len(lines), level.num_decoys(rng, len(lines)))):
        other = lines[label]
        while other == lines[label]:
            other = Instruction(
                *(rng.choice(pool[:9]) if part != "sign" else rng.choice("+-") for part in Instruction.__annotations__)
            )
        program.append(f"{rng.choice(FALSE_LINE)} {label} {other} ;")
    rng.shuffle(settings)
    rng.shuffle(program)
    noise = filler(rng, ("number", "variable", "label"), rng.randint(*level.filler), {"@": pool, "!": list(lines)})
    return " ".join(scatter(rng, settings + program, noise))
