"""The card of shared gates: what they are, what they were trained on, what they reached; unknown things are said to be."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template

from learnevict import methods
from learnevict.hub.card_tables import family, join, of_gates, results, shown, tables
from learnevict.hub.gates import TESTBED, Gates, GatesConfig
from learnevict.hub.repo import Address
from learnevict.infer.load import HUB_ID
from learnevict.infer.model.fingerprint import weight_hash
from learnevict.untrusted import one_line

TEMPLATE = Path(__file__).with_name("card.md")
MARK = "*Written by `learnevict push`. A README.md without this line is shared as it is.*"
LIBRARY = "learnevict"
UNKNOWN = "not recorded"

Row = Mapping[str, Any]

ON_THE_TESTBED = """\
from learnevict import Gates, attach, testbed

model, tokenizer = testbed.load()
prompt = testbed.generate("program", seed=3).prompt
"""
ON_A_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

from learnevict import Gates, attach

model = AutoModelForCausalLM.from_pretrained({base}{revision}){remark}
tokenizer = AutoTokenizer.from_pretrained({base}{revision})
prompt = "Why is the sky blue?"
"""
THEN = """
policy = Gates.load({source}, model).policy({terms})
inputs = tokenizer(prompt, return_tensors="pt"{plain})
with attach(model, policy) as cache:
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
print(f"{{cache.nbytes}} bytes of keys and values, {{cache.full_nbytes}} with a full cache")"""


def make_card(gates: Gates, source: Address, rows: Sequence[Row] = (), license: str | None = None) -> str:
    """The text of README.md, with metadata that the Hub reads; the same for the same arguments.

    Args:
        gates: what it tells about.
        source: where they will be.
        rows: of an evaluation (learnevict.evals.summaries), those of other methods too: they are what to compare with.
        license: that the repository states.

    Raises:
        UsageError: no row is of these gates, or some do not say of which gates they are.
    """
    config: Any = gates.config
    method, module = config.method, methods.known(config.method)
    measured = join(rows)
    mine = of_gates(measured, method, weight_hash(gates))
    name, chosen = base_of(config), chosen_terms(config, mine)
    card = Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        card_data=metadata(config, source, mine, license).to_yaml(),
        title=f"{one_line(method)} gates for {name}",
        method=one_line(method),
        base=f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{name}`",
        summary=summary_of(module),
        revision=one_line(config.base_revision) or UNKNOWN,
        fingerprint=f"`{one_line(config.base_hash)}`" if config.base_hash else UNKNOWN,
        layout=", ".join(one_line(f"{part.replace('_', ' ')} {value}") for part, value in config.layout.items()),
        paper=cited(module.PAPER),
        parameters=f"{gates.num_parameters():,}",
        settings=flat(config.settings),
        data=data_of(config.training),
        budgets=budgets_of(config.training),
        shares=shares_of(config.settings),
        training=flat(config.training),
        tables=tables(mine, measured),
        source=source,
        code=code_of(config, source, chosen),
        command=command_of(config, source, chosen),
        known=known(mine),
        license_line=f"License: {one_line(license)}."
        if license
        else "No license was stated when the gates were shared.",
        citation=bibtex(module.PAPER),
        mark=MARK,
    )
    return str(ModelCard(card))


def metadata(config: GatesConfig, source: Address, mine: Sequence[Row], license: str | None) -> ModelCardData:
    """What the Hub reads of a card: to which model it belongs, tags, license, and the measurements as a model index."""
    arxiv, found, name = methods.known(config.method).PAPER.arxiv, results(mine), base_of(config)
    tags = [LIBRARY, "kv-cache", "kv-cache-eviction", one_line(config.method)]
    return ModelCardData(
        model_name=source.repo_id.partition("/")[2] if found else None,
        base_model=name if is_hub_id(name) else None,
        library_name=LIBRARY,
        license=one_line(license) if license else None,
        tags=tags + [f"arxiv:{arxiv}"] * bool(arxiv),
        eval_results=found or None,
    )


def base_of(config: GatesConfig) -> str:
    """What to call the base model, on one line."""
    return shown(config.base_name) or UNKNOWN


def is_hub_id(name: str) -> bool:
    """Whether a base model can be linked to: user/repo."""
    return name.count("/") == 1 and HUB_ID.fullmatch(name) is not None


def summary_of(module: Any) -> str:
    """What a method's docstring calls it, without its name."""
    first = (module.__doc__ or "a method of its own").strip().splitlines()[0]
    return one_line(first.partition(": ")[2] or first).rstrip(".")


def cited(paper: Any) -> str:
    """Title, link and year."""
    if paper.arxiv is None:
        return f"{paper.title}; no paper."
    return f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}), {paper.year}."


def bibtex(paper: Any) -> str:
    """What arXiv knows of the paper; "" without one."""
    if paper.arxiv is None:
        return ""
    key = f"arxiv_{paper.arxiv.replace('.', '_')}"
    fields = {
        "title": f"{{{paper.title}}}", "year": str(paper.year), "eprint": paper.arxiv, "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{paper.arxiv}",
    }  # fmt: skip
    return "\n".join([f"@misc{{{key},", *(f"  {name} = {{{value}}}," for name, value in fields.items()), "}"])


def merged(training: Mapping[str, Any]) -> dict[str, Any]:
    """What was set, in whichever part of the record it stands; the run before it is another."""
    found = dict(training)
    for name, part in training.items():
        found |= dict(part) if isinstance(part, Mapping) and name != "before" else {}
    return found


def data_of(training: Mapping[str, Any]) -> str:
    """What the gates were trained on, as far as the run recorded it: `documents` is a limit, not what there was."""
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
    """The budgets of the training."""
    found = merged(training)
    ends = found.get("budgets") or [found.get("min_budget"), found.get("max_budget")]
    if isinstance(ends, (list, tuple)) and len(ends) == 2 and None not in ends:
        return f"Budgets of the training: {one_line(ends[0])} to {one_line(ends[1])} slots per layer and kv head."
    return "The budgets of the training are not recorded."


def shares_of(settings: Mapping[str, Any]) -> str:
    """Whether layers share a budget as they have learned to (parts.demand); "" where they do not."""
    demand = settings.get("demand")
    if not isinstance(demand, (list, tuple)) or len(demand) != 3:
        return ""
    layers, smallest, largest = map(one_line, demand)
    return (
        f"How {layers} layers share a budget was learned too, for {smallest} to {largest} slots per layer and kv head beyond "
        "the smallest budget that works."
    )


def known(mine: Sequence[Row]) -> str:
    """How far the measurements reach."""
    if not mine:
        return "Nothing is known about their quality on any data."
    names = "; ".join(sorted({family(row) for row in mine}))
    found = sorted({row["budget"] for row in mine if isinstance(row["budget"], int)})
    reach = f"at budgets of {found[0]} to {found[-1]} slots" if found else "at the budgets above"
    return f"Measured on {names}, {reach}; elsewhere nothing is known."


def chosen_terms(config: GatesConfig, mine: Sequence[Row]) -> dict[str, Any]:
    """Budget and options for the example: of the first measurement, else what suits the base model."""
    for row in mine:
        if isinstance(row["budget"], int):
            rules = dict(row.get("rules") or {})
            return {
                "budget": row["budget"],
                **{name: rules[name] for name in ("slack", "sinks", "recent") if rules.get(name) is not None},
            }
    return {"budget": 64, "slack": 16, "sinks": 4, "recent": 8} if config.base_name == TESTBED else {"budget": 512}


def code_of(config: GatesConfig, source: Address, terms: Mapping[str, Any]) -> str:
    """An example that runs."""
    name, testbed = base_of(config), config.base_name == TESTBED
    revision = f", revision={json.dumps(config.base_revision)}" if config.base_revision else ""
    remark = "" if is_hub_id(name) else "  # a folder: where else to find it is not recorded"
    start = ON_THE_TESTBED if testbed else ON_A_MODEL.format(base=json.dumps(name), revision=revision, remark=remark)
    own = (
        ""
        if config.method in methods.METHODS
        else f"import {config.method}  # a method of its owner's, not of learnevict\n"
    )
    written = ", ".join(f"{key}={value!r}" for key, value in terms.items())
    return (
        own
        + start
        + THEN.format(source=json.dumps(str(source)), terms=written, plain=", add_special_tokens=False" * testbed)
    )


def command_of(config: GatesConfig, source: Address, terms: Mapping[str, Any]) -> str:
    """The same on the command line."""
    testbed = config.base_name == TESTBED
    model = f"--model {shlex.quote(base_of(config))}"
    prompt = "--task program --seed 3" if testbed else f'{model} --chat --prompt "Why is the sky blue?"'
    own = "" if config.method in methods.METHODS else f" --method {config.method}"
    return f"learnevict infer {prompt} --ckpt {source}{own} --budget {terms['budget']}"


def flat(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a record says, by name, and what its parts say, as part.name; the run before it is left to config.json."""
    found = {**record, **dict(record.get("config") or {})}
    parts = {key: part for key, part in found.items() if isinstance(part, Mapping) and key not in ("before", "config")}
    found |= {f"{key}.{name}": value for key, part in parts.items() for name, value in part.items()}
    plain = {name: _plain(value) for name, value in found.items()}
    return [(one_line(name), text) for name, text in sorted(plain.items()) if text]


def _plain(value: object) -> str:
    """A number, a text, or some of them; "" for anything else."""
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, (_plain(item) for item in value)))
    return shown(value) if isinstance(value, (str, int, float)) else ""
