"""Every method, one paper a file. The command line, the README's table, the test matrix and the docs derive from METHODS.

A method module has `PAPER`, `policy(budget, ...)`, and if it is learned a final `Gate`. An import path such as
`my_package.my_method` is accepted wherever a name is: that is the whole plugin system.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from learnevict.errors import UsageError

METHODS: tuple[str, ...] = (
    "full",
    "random",
    "lexical",
    "clausal",
    "streaming_llm",
    "knorm",
    "h2o",
    "tova",
    "snapkv",
    "pyramidkv",
    "adakv",
    "rkv",
    "expected_attention",
    "keydiff",
    "golden",
    "foresightkv",
    "trimkv",
    "wg_kv",
    "dms",
    "kvzap",
    "fast_kvzip",
    "kvp",
    "kvpop",
    "judge_q",
    "lookahead_kv",
)


@dataclass(frozen=True)
class Paper:
    """Where a method comes from. `kind`: "reference", "heuristic" or "learned" (needs gates)."""

    title: str
    arxiv: str | None
    year: int
    kind: str = "heuristic"


def load(name: str) -> ModuleType:
    """A method module by name or import path.

    Raises:
        UsageError: no such method, or the module lacks PAPER or policy.
    """
    path = f"learnevict.methods.{name}" if name in METHODS else name
    try:
        module = import_module(path)
    except ImportError as error:
        if error.name not in (path, path.partition(".")[0]):
            raise UsageError(f"module {path!r} could not be imported: {error}") from error
        raise UsageError(
            f"there is no method {name!r}; known: {', '.join(METHODS)}; or give the import path of your own module"
        ) from error
    missing = [part for part in ("PAPER", "policy") if part not in vars(module)]
    if missing:
        raise UsageError(
            f"module {path!r} is not a method: it lacks {' and '.join(missing)}; README.md shows one in 30 lines"
        )
    return module


def __getattr__(name: str) -> ModuleType:
    if name in METHODS:
        return import_module(f"learnevict.methods.{name}")
    raise AttributeError(f"module 'learnevict.methods' has no attribute {name!r}")
