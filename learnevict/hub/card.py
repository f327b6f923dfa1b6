"""The card of shared gates: what they are, what they were trained on, what they reached; unknown things are said to be."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from learnevict import methods
from learnevict.hub.card_tables import family, join, of_gates, results, shown, tables
from learnevict.hub.gates import TESTBED, Gates, GatesConfig
from learnevict.hub.repo import Address
from learnevict.infer.model.catalogue import HUB_ID
from learnevict.infer.model.supported import weight_hash
from learnevict.untrusted import one_line

TEMPLATE = Path(__file__).with_name("card.md")
MARK = "*Written by `learnevict push`. A README.md without this line is shared as it is.*"
LIBRARY = "learnevict"
UNKNOWN = "not recorded"

Row = Mapping[str, Any]


def make_card(gates: Gates, source: Address, rows: Sequence[Row] = (), license: str | None = None) -> str:
    """Returns the text of README.md, with metadata that the Hub reads; the same for the same arguments.

    Args:
        gates: what it tells about.
        source: where they will be.
        rows: of an evaluation (learnevict.evals.records), those of other methods too: they are what to compare with.
        license: that the repository states.

    Raises:
        UsageError: no row is of these gates, or some do not say of which gates they are.
    """
    config: Any = gates.config
    method, module = config.method, methods.known(config.method)
    measured = join(rows)
    mine = of_gates(measured, method, weight_hash(gates))
    base, options = shown(config.base_name) or UNKNOWN, example_options(config, mine)
    linked = base.count("/") == 1 and HUB_ID.fullmatch(base) is not None
    layers, first = config.settings.get("demand"), (module.__doc__ or "a method of its own").strip().splitlines()[0]
    opened = json.dumps(base) + (f", revision={json.dumps(config.base_revision)}" if config.base_revision else "")
    card = ModelCard.from_template(
        metadata(config, base if linked else None, source, mine, license),
        str(TEMPLATE),
        method=one_line(method),
        base_name=base,
        base=f"[{base}](https://huggingface.co/{base})" if linked else f"`{base}`",
        summary=one_line(first.partition(": ")[2] or first).rstrip("."),
        revision=one_line(config.base_revision) or UNKNOWN,
        fingerprint=f"`{one_line(config.base_hash)}`" if config.base_hash else UNKNOWN,
        layout=", ".join(one_line(f"{part.replace('_', ' ')} {value}") for part, value in config.layout.items()),
        paper=module.PAPER,
        parameters=f"{gates.num_parameters():,}",
        settings=flat(config.settings),
        data=data_of(config.training),
        budgets=budgets_of(config.training),
        layer_budgets=list(map(one_line, layers)) if isinstance(layers, (list, tuple)) and len(layers) == 3 else None,
        training=flat(config.training),
        tables=tables(mine, measured),
        source=source,
        testbed=config.base_name == TESTBED,
        own_method=None if method in methods.METHODS else method,
        linked=linked,
        opened=opened,
        quoted_source=json.dumps(str(source)),
        options=", ".join(f"{key}={value!r}" for key, value in options.items()),
        budget=options["budget"],
        shell_base=shlex.quote(base),
        known=known(mine),
        license=one_line(license) if license else None,
        mark=MARK,
    )
    return f"{card}\n"


def metadata(
    config: GatesConfig, base: str | None, source: Address, mine: Sequence[Row], license: str | None
) -> ModelCardData:
    """Returns what the Hub reads of a card: to which model it belongs, tags, license, and the measurements as a model index."""
    arxiv, found = methods.known(config.method).PAPER.arxiv, results(mine)
    tags = [LIBRARY, "kv-cache", "kv-cache-eviction", one_line(config.method)]
    return ModelCardData(
        model_name=source.repo_id.partition("/")[2] if found else None,
        base_model=base,
        library_name=LIBRARY,
        license=one_line(license) if license else None,
        tags=tags + [f"arxiv:{arxiv}"] * bool(arxiv),
        eval_results=found or None,
    )


def merged(training: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all settings of a record, of whichever part; those of the run before it are left out."""
    found = dict(training)
    for name, part in training.items():
        found |= dict(part) if isinstance(part, Mapping) and name != "before" else {}
    return found


def data_of(training: Mapping[str, Any]) -> str:
    """Returns a sentence on what the gates were trained on, as far as it was recorded; `documents` is a limit."""
    found = merged(training)
    if not any(found.get(name) for name in ("data", "labels", "documents", "data_hash")):
        return "What the gates were trained on is not recorded."
    number = f"at most {one_line(found['documents'])}" if found.get("documents") else "an unrecorded number of"
    source = f" of `{shown(found['data'])}`" if found.get("data") else ""
    if found.get("labels"):
        parts = [f"Trained on the labelled documents in `{shown(found['labels'])}`"]
    elif found.get("streaming"):
        parts = [f"Trained on a stream of documents{source}, as many as its steps took"]
    else:
        parts = [f"Trained on {number} documents{source}"]
    if found.get("own_answers"):
        parts.append("with answers that the base model wrote")
    if found.get("families"):
        parts.append(f"(families {one_line(found['families'])})")
    if found.get("data_hash"):
        parts.append(f"with fingerprint `{one_line(found['data_hash'])}`")
    return " ".join(parts) + "."


def budgets_of(training: Mapping[str, Any]) -> str:
    """Returns a sentence on the budgets of the training."""
    found = merged(training)
    ends = found.get("budgets") or [found.get("min_budget"), found.get("max_budget")]
    if isinstance(ends, (list, tuple)) and len(ends) == 2 and None not in ends:
        return f"Budgets of the training: {one_line(ends[0])} to {one_line(ends[1])} slots per layer and kv head."
    return "The budgets of the training are not recorded."


def known(mine: Sequence[Row]) -> str:
    """Returns how far the measurements reach."""
    if not mine:
        return "Nothing is known about their quality on any data."
    names = "; ".join(sorted({family(row) for row in mine}))
    found = sorted({row["budget"] for row in mine if isinstance(row["budget"], int)})
    reach = f"at budgets of {found[0]} to {found[-1]} slots" if found else "at the budgets above"
    return f"Measured on {names}, {reach}; elsewhere nothing is known."


def example_options(config: GatesConfig, mine: Sequence[Row]) -> dict[str, Any]:
    """Returns budget and options for the example: of the first measurement, else what suits the base model."""
    for row in mine:
        if isinstance(row["budget"], int):
            settings = dict(row.get("rules") or {})
            return {
                "budget": row["budget"],
                **{name: settings[name] for name in ("slack", "sinks", "recent") if settings.get(name) is not None},
            }
    return {"budget": 64, "slack": 16, "sinks": 4, "recent": 8} if config.base_name == TESTBED else {"budget": 512}


def flat(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the values of a record by name, and of its parts as part.name; the run before it is left to config.json."""
    found = {**record, **dict(record.get("config") or {})}
    parts = {key: part for key, part in found.items() if isinstance(part, Mapping) and key not in ("before", "config")}
    found |= {f"{key}.{name}": value for key, part in parts.items() for name, value in part.items()}
    plain = {name: _plain(value) for name, value in found.items()}
    return [(one_line(name), text) for name, text in sorted(plain.items()) if text]


def _plain(value: object) -> str:
    """Returns a number, a text, or some of them, as text; "" for anything else."""
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, (_plain(item) for item in value)))
    return shown(value) if isinstance(value, (str, int, float)) else ""
