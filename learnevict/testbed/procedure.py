"""Family procedure: follow the open roads from the start until home, and report what each road makes you carry.

open mill tower lamp ; shut mill forest key ; ... start mill ;
-> mill tower lamp ; tower castle honey ; ... quarry home drum ; answer quarry drum
"""

from __future__ import annotations

from random import Random

from learnevict.testbed.clauses import Level, another, filler, scatter
from learnevict.testbed.vocabulary import FALSE_ROAD, PLACES, TRUE_ROAD, VALUES

LEVELS = (
    Level((2, 4), 0.0, (0, 0), chatter=False),
    Level((3, 6), 0.8, (0, 0), chatter=False),
    Level((6, 10), 1.0, (0, 20)),
    Level((8, 12), 1.1, (30, 90)),
    Level((10, 12), 1.2, (100, 140)),
)
LONG = Level((15, 16), 1.2, (150, 190))


def generate(rng: Random, level: Level) -> list[tuple[str, str]]:
    """Returns one walk as chat turns; words of the answer mask carry a "?". At most one open road lies off the path."""
    num_hops = level.num_items(rng)
    places = rng.sample(PLACES, min(len(PLACES), num_hops + 2))
    stops = places[:num_hops]
    roads = [(here, there, rng.choice(VALUES)) for here, there in zip(stops, [*stops[1:], "home"], strict=True)]
    table = [f"{rng.choice(TRUE_ROAD)} {here} {there} {item} ;" for here, there, item in roads]
    if level.decoys and rng.random() < 0.5:
        table.append(f"{rng.choice(TRUE_ROAD)} {places[-1]} {rng.choice(stops)} {rng.choice(VALUES)} ;")
    for here, there, item in rng.sample(roads, min(num_hops, level.num_decoys(rng, num_hops))):
        wrong = another(rng, [*places, "home"], here, there)
        table.append(f"{rng.choice(FALSE_ROAD)} {here} {wrong} {another(rng, VALUES, item)} ;")
    rng.shuffle(table)
    items = [clause.split()[-2] for clause in table]
    noise = filler(rng, ("road", "road", "number"), rng.randint(*level.filler), {"&": places, "$": items})
    prompt = f"{' '.join(scatter(rng, table, noise))} start {stops[0]} ;"
    steps: list[str] = []
    for here, there, item in roads:
        steps.append(f"{here} ?{there} ?{item} ;" + (_remark(here, there, item) if level.chatter else ""))
    return [("user", prompt), ("assistant", f"{' '.join(steps)} answer ?{stops[-1]} ?{roads[-1][2]}")]


def _remark(here: str, there: str, item: str) -> str:
    """Returns a remark that depends on the step only: on the place left behind."""
    kind = PLACES.index(here) % 6
    remarks = {1: f" rest near {there} with the {item} ;", 3: f" see {here} again ;", 4: f" the {item} was at {here} ;"}
    return remarks.get(kind, "")
