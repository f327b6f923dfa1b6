"""Family recall: facts stated once among rumours about the same people, asked at the very end.

fact ann river stone ; rumour ann lamp key ; ... ask bob ann ;
-> answer bob cloud tree ann river stone
"""

from __future__ import annotations

from random import Random

from learnevict.testbed.clauses import Level, filler, scatter
from learnevict.testbed.vocabulary import FALSE_FACT, NAMES, TRUE_FACT, VALUES

LEVELS = (
    Level((2, 4), 0.0, (0, 0)),
    Level((3, 6), 1.0, (0, 0)),
    Level((4, 8), 1.7, (10, 40)),
    Level((4, 7), 2.4, (50, 130)),
    Level((4, 5), 3.4, (190, 250)),
)
LONG = Level((6, 7), 3.4, (280, 340))


def tastes(rng: Random, num: int) -> list[str]:
    """Returns so many values of two words, no word twice: else the second word would not follow from the first."""
    drawn = rng.sample(VALUES, 2 * num)
    return [f"{first} {second}" for first, second in zip(drawn[::2], drawn[1::2], strict=True)]


def marked(value: str) -> str:
    """Returns the value with both words in the answer mask."""
    return " ".join(f"?{word}" for word in value.split())


def generate(rng: Random, level: Level) -> list[tuple[str, str]]:
    """Returns facts, rumours and questions as chat turns; words of the answer mask carry a "?". One fact may stay unasked."""
    num_facts = level.num_items(rng)
    names = rng.sample(NAMES, num_facts + 1)
    facts = dict(zip(names, tastes(rng, num_facts), strict=False))
    told = [f"{rng.choice(TRUE_FACT)} {name} {value} ;" for name, value in facts.items()]
    for _ in range(level.num_decoys(rng, num_facts)):
        told.append(f"{rng.choice(FALSE_FACT)} {rng.choice(names)} {tastes(rng, 1)[0]} ;")
    rng.shuffle(told)
    words = [word for clause in told for word in clause.split() if word in VALUES]
    noise = filler(rng, ("person", "person", "number"), rng.randint(*level.filler), {"%": names, "$": words})
    asked = rng.sample(list(facts), num_facts - rng.randint(0, 1))
    prompt = f"{' '.join(scatter(rng, told, noise))} ask {' '.join(asked)} ;"
    return [("user", prompt), ("assistant", "answer " + " ".join(f"{name} {marked(facts[name])}" for name in asked))]
