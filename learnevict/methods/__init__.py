"""Every method, one paper a file. The command line, the README's table, the test matrix and the docs derive from METHODS.

A method has `PAPER` and `policy(budget, **options)`: a budget is a number of tokens, "25%" or "64MiB", options are its own and
those of parts.options.Options. A learned one has `build(layout, **settings)`, which makes a fresh gate; its policy takes a
trained one, from `Gates.from_pretrained(...)`. An import path such as `my_package.my_method` is accepted wherever a name is:
that is the plugin system. Who gives the name decides what is imported: a user's is (`load`), a file's is not (`known`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from learnevict.errors import GateError, UsageError

METHODS: tuple[str, ...] = (
    "full", "random", "random_attention", "lexical", "clausal", "streaming_llm", "knorm", "h2o", "tova", "keyformer", "snapkv",
    "pyramidkv", "adakv", "defensivekv", "rkv", "pyramid_rkv", "reasonalloc", "g_kv", "lazy_eviction", "vase", "obcache",
    "caote", "flowkv", "qpruningkv", "mikv", "expected_attention", "keydiff", "kvzip", "laq", "golden", "foresightkv", "trimkv",
    "dbtrimkv", "wg_kv", "dms", "kvzap", "fast_kvzip", "kvp", "kvpop", "judge_q", "lookahead_kv",
)  # fmt: skip


PARTS: dict[str, str] = {
    "reference": "what all others are compared with",
    "score": "which tokens stay",
    "allocation": "how many slots layers and heads hold",
    "schedule": "when tokens compete for slots",
    "store": "what becomes of tokens that lose",
    "wrapper": "another method's scores, changed",
    "learned": "which tokens stay, as trained gates say",
}
"""Groups of methods, by what they decide."""
OPEN = {"score": "base", "allocation": "allocation", "schedule": "schedule"}
"""Options by which a caller chooses what a method does not decide itself."""


@dataclass(frozen=True)
class Paper:
    """Where a method comes from, and what it decides.

    Attributes:
        kind: "reference", "heuristic" or "learned" (needs gates).
        decides: what of PARTS the method decides itself, the most important first; the rest is the caller's to choose.
    """

    title: str
    arxiv: str | None
    year: int
    kind: str = "heuristic"
    decides: tuple[str, ...] = ("score",)

    @property
    def group(self) -> str:
        """The name among PARTS under which tables show it."""
        return self.decides[0] if self.kind == "heuristic" else self.kind

    @property
    def takes(self) -> tuple[str, ...]:
        """The options by which it composes with others: "gate", "base" (another method), "allocation", "schedule"."""
        gate = ("gate",) if self.kind == "learned" else ()
        return gate + tuple(option for part, option in OPEN.items() if part not in self.decides)


def load(name: str) -> ModuleType:
    """Returns a method's module by name or import path, as a user gives it: it is imported.

    Raises:
        UsageError: no such method, or the module lacks PAPER or policy.
    """
    path = f"learnevict.methods.{name}" if name in METHODS else name
    strange = UsageError(
        f"there is no method {name!r}; known: {', '.join(METHODS)}; or give the import path of your own module"
    )
    if not all(part.isidentifier() for part in path.split(".")):
        raise strange
    try:
        module = import_module(path)
    except ImportError as error:
        if error.name not in (path, path.partition(".")[0]):
            raise UsageError(f"module {path!r} could not be imported: {error}") from error
        raise strange from error
    return _checked(module, path)


def known(name: str) -> ModuleType:
    """Returns a method's module by a name that gates give: one of METHODS, or one that the caller has named or imported.

    Gates come from other people. Were theirs imported, a config.json could run any module that lies about.

    Raises:
        GateError: neither.
        UsageError: the module lacks PAPER or policy.
    """
    if name in METHODS:
        return load(name)
    module = sys.modules.get(name)
    if module is None:
        raise GateError(
            f"these gates are of {name!r}, which is no method of learnevict, and no module is imported because gates name it; "
            f"if you trust it, name it yourself (--method {name}; in Python: import {name})"
        )
    return _checked(module, name)


def _checked(module: ModuleType, path: str) -> ModuleType:
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
