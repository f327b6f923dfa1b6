"""beartype as the import hook in conftest.py applies it to every function of learnevict."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, FrozenDict, beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks arguments and results at each call; arguments declared as a Protocol pass, since pyright checks those.

    A runtime check of a Protocol evaluates every property it names, and `Slots.position` may gather pages.
    """
    namespace = vars(sys.modules[function.__module__])
    protocols = {
        hint: object for hint in namespace.values() if isinstance(hint, type) and getattr(hint, "_is_protocol", 0)
    }
    return beartype(conf=BeartypeConf(hint_overrides=FrozenDict(protocols), is_pep484_tower=True))(function)
