"""Family ledger: opening balances and a numbered stream of postings; a balance dies when the next one replaces it.

given ann 5 ; rumour ann 7 ; post L3 ann + 4 ; void L3 bob - 2 ; ... run L3 to L9 ; ask ann bob ;
-> L3 ann 5 + 4 = ann 9 ; ... answer ann 9 bob 4
"""

from __future__ import annotations

from random import Random

from learnevict.testbed.clauses import Level, another, filler, scatter
from learnevict.testbed.program import chatter
from learnevict.testbed.vocabulary import DIGITS, FALSE_FACT, FALSE_LINE, LABELS, NAMES, TRUE_FACT, TRUE_LINE

LEVELS = (
    Level((2, 4), 0.0, (0, 0), chatter=False),
    Level((3, 5), 0.8, (0, 0), chatter=False),
    Level((5, 8), 1.0, (0, 20)),
    Level((6, 9), 1.1, (25, 75)),
    Level((7, 9), 1.2, (80, 120)),
)
LONG = Level((11, 12), 1.2, (120, 160))


def generate(rng: Random, level: Level) -> list[tuple[str, str]]:
    """Returns one ledger as chat turns; words of the answer mask carry a "?". Balances stay between 0 and 9."""
    num_postings = level.num_items(rng)
    names = rng.sample(NAMES, rng.randint(4, 5) if num_postings > 5 else rng.randint(2, 3))
    balances = {name: rng.randint(0, 9) for name in names}
    opening = dict(balances)
    first = rng.randint(0, len(LABELS) - num_postings)
    labels = LABELS[first : first + num_postings]
    postings, steps, untouched = {}, [], list(names)
    for label in labels:
        name = rng.choice(untouched if untouched and rng.random() < 0.5 else names)
        untouched = [other for other in untouched if other != name]
        before = balances[name]
        after = int(another(rng, DIGITS, str(before)))
        sign, amount = ("+", after - before) if after > before else ("-", before - after)
        balances[name] = after
        postings[label] = f"{name} {sign} {amount}"
        step = f"{label} ?{name} ?{before} {sign} ?{amount} = {name} ?{after} ;"
        steps.append(step + (chatter(after, name, name) if level.chatter else ""))
    asked = rng.sample(names, min(len(names), 3))
    prompt = f"{_prompt(rng, level, opening, postings)} run {labels[0]} to {labels[-1]} ; ask {' '.join(asked)} ;"
    answer = " ".join(f"{name} ?{balances[name]}" for name in asked)
    return [("user", prompt), ("assistant", f"{' '.join(steps)} answer {answer}")]


def _prompt(rng: Random, level: Level, opening: dict[str, int], postings: dict[str, str]) -> str:
    """Returns openings in any order, then the stream in its order, with void postings and filler between."""
    names = list(opening)
    openings = [f"{rng.choice(TRUE_FACT)} {name} {value} ;" for name, value in opening.items()]
    for _ in range(level.num_decoys(rng, len(names))):
        name = rng.choice(names)
        openings.append(f"{rng.choice(FALSE_FACT)} {name} {another(rng, DIGITS, str(opening[name]))} ;")
    rng.shuffle(openings)
    stream = [f"{rng.choice(TRUE_LINE)} {label} {posting} ;" for label, posting in postings.items()]
    void: list[str] = []
    for _ in range(level.num_decoys(rng, len(stream))):
        label = rng.choice(list(postings))
        other = postings[label]
        while other == postings[label]:
            other = f"{rng.choice(names)} {rng.choice('+-')} {rng.randint(1, 9)}"
        void.append(f"{rng.choice(FALSE_LINE)} {label} {other} ;")
    noise = filler(rng, ("number", "account"), rng.randint(*level.filler), {"%": names, "!": list(postings)})
    return " ".join(scatter(rng, openings + scatter(rng, stream, void), noise))
