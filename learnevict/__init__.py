"""learnevict: train, evaluate and deploy learned KV-cache eviction.

Importing this package only defines names; transformers is loaded when a name that needs it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learnevict import methods, oracle
    from learnevict.hub import Gates
    from learnevict.infer.attach import attach
    from learnevict.infer.cache import EvictingCache
    from learnevict.infer.teacher_forcing import replay

__version__ = "0.1.0"
__all__ = ["EvictingCache", "Gates", "__version__", "attach", "methods", "oracle", "replay"]

_HOMES = {
    "attach": "learnevict.infer.attach",
    "EvictingCache": "learnevict.infer.cache",
    "replay": "learnevict.infer.teacher_forcing",
    "Gates": "learnevict.hub",
}


def __getattr__(name: str) -> Any:
    if name in ("methods", "oracle"):
        return import_module(f"learnevict.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'learnevict' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
