"""Family dialogue: facts and jokes over several turns, some facts renewed later, questions between and at the end.

<user> fact ann river stone ; joke bob key drum ; ask ann ; <end> <assistant> answer ann river stone <end>
<user> fact ann amber lemon ; ... <end> <assistant> noted , thanks <end> <user> ... ask bob ann ; <end> <assistant>
"""

from __future__ import annotations

from random import Random

from learnevict.testbed.clauses import Level, filler, scatter
from learnevict.testbed.recall import marked, tastes
from learnevict.testbed.vocabulary import FALSE_FACT, NAMES, TRUE_FACT

LEVELS = (
    Level((3, 5), 0.0, (0, 0)),
    Level((4, 6), 0.8, (0, 0)),
    Level((5, 8), 1.2, (10, 40)),
    Level((5, 8), 1.7, (50, 110)),
    Level((6, 7), 2.4, (140, 200)),
)
LONG = Level((8, 10), 2.4, (210, 270))


def generate(rng: Random, level: Level) -> list[tuple[str, str]]:
    """Returns one conversation as chat turns; words of the answer mask carry a "?". Items count tellings, renewals included."""
    num_told = level.num_items(rng)
    num_renewed = rng.randint(1, 2) if num_told > 4 else 1
    num_turns = rng.randint(3, 4) if num_told > 4 else 2
    names: list[str] = rng.sample(NAMES, num_told - num_renewed + 1)
    order = names[:-1] + rng.sample(names[:-1], num_renewed)
    rng.shuffle(order)
    told: list[tuple[str, str]] = list(zip(order, tastes(rng, num_told), strict=True))
    cuts = sorted(rng.sample(range(1, num_told), num_turns - 1))
    parts = [told[start:stop] for start, stop in zip([0, *cuts], [*cuts, num_told], strict=True)]
    decoys = [0] * num_turns
    for _ in range(level.num_decoys(rng, num_told)):
        decoys[rng.randrange(num_turns)] += 1
    share = rng.randint(*level.filler) // num_turns
    known: dict[str, str] = {}
    turns: list[tuple[str, str]] = []
    for index, part in enumerate(parts):
        known.update(part)
        last = index == num_turns - 1
        clauses = _turn(rng, part, decoys[index], names, share)
        asked = rng.sample(list(known), _num_asked(rng, len(known), last))
        turns.append(("user", " ".join(clauses + ([f"ask {' '.join(asked)} ;"] if asked else []))))
        answer = "answer " + " ".join(f"{name} {marked(known[name])}" for name in asked)
        turns.append(("assistant", answer if asked else "noted , thanks"))
    return turns


def _num_asked(rng: Random, num_known: int, last: bool) -> int:
    """Returns up to four names at the end, one or none before."""
    return min(num_known, rng.randint(3, 4)) if last else rng.randint(0, 1)


def _turn(rng: Random, facts: list[tuple[str, str]], num_decoys: int, names: list[str], num_filler: int) -> list[str]:
    """Returns one user turn: facts in their order, jokes about the same people and filler between."""
    told = [f"{rng.choice(TRUE_FACT)} {name} {value} ;" for name, value in facts]
    jokes = [f"{rng.choice(FALSE_FACT)} {rng.choice(names)} {tastes(rng, 1)[0]} ;" for _ in range(num_decoys)]
    mixed = scatter(rng, told, jokes)
    words = [word for clause in mixed for word in clause.split()[2:4]]
    noise = filler(rng, ("person", "person", "number"), num_filler, {"%": names, "$": words})
    return ["hello ;"] * (rng.random() < 0.3) + scatter(rng, mixed, noise)
