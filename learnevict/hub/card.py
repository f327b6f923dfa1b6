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
from learnevict.errors import UsageError
from learnevict.hub.gates import TESTBED, GatesConfig
from learnevict.hub.measured import join, one_line, results, shown, tables
from learnevict.hub.reach import Address
from learnevict.infer.load import HUB_ID

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


def make_card(
    config: GatesConfig, num_parameters: int, source: Address, rows: Sequence[Row] = (), license: str | None = None
) -> str:
    """The text of README.md, with metadata that the Hub reads; the same for the same arguments.

    Args:
        config: of the gates.
        num_parameters: how many weights they have.
        source: where they will be.
        rows: of an evaluation (learnevict.evals.rows), those of other methods too: they are what to compare with.
        license: that the repository states.

    Raises:
        UsageError: no row is of the gates' method.
    """
    method, module = config.method, methods.load(config.method)
    measured = join(rows)
    if rows and not any(row["method"] == method for row in measured):
        found = ", ".join(sorted({str(row["method"]) for row in rows}))
        raise UsageError(
            f"the rows are of {found}, none of {method}, whose gates these are; give rows of an evaluation with them"
        )
    name, chosen = config.base_name or UNKNOWN, chosen_terms(config, measured)
    card = Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        card_data=metadata(config, source, measured, license).to_yaml(),
        title=f"{one_line(method)} gates for {one_line(name)}",
        method=one_line(method),
        base=f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{one_line(name)}`",
        summary=summary_of(module),
        revision=one_line(config.base_revision) or UNKNOWN,
        fingerprint=f"`{one_line(config.base_hash)}`" if config.base_hash else UNKNOWN,
        layout=", ".join(f"{name.replace('_', ' ')} {value}" for name, value in config.layout.items()),
        paper=cited(module.PAPER),
        parameters=f"{num_parameters:,}",
        settings=flat(config.settings),
        data=data_of(config.training),
        budgets=budgets_of(config.training),
        training=flat(config.training),
        tables=tables(measured, method),
        source=source,
        code=code_of(config, source, chosen),
        command=command_of(config, source, chosen),
        known=known(measured, method),
        license_line=f"License: {license}." if license else "No license was stated when the gates were shared.",
        citation=bibtex(module.PAPER),
        mark=MARK,
    )
    return str(ModelCard(card))


def metadata(config: GatesConfig, source: Address, rows: Sequence[Row], license: str | None) -> ModelCardData:
    """What the Hub reads of a card: to which model it belongs, tags, license, and the measurements as a model index."""
    arxiv, found = methods.load(config.method).PAPER.arxiv, results(rows, config.method)
    tags = [LIBRARY, "kv-cache", "kv-cache-eviction", one_line(config.method)]
    return ModelCardData(
        model_name=source.repo_id.partition("/")[2] if found else None,
        base_model=config.base_name if is_hub_id(config.base_name) else None,
        library_name=LIBRARY,
        license=license,
        tags=tags + [f"arxiv:{arxiv}"] * bool(arxiv),
        eval_results=found or None,
    )


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
    """What was set, in whichever part of the record it stands."""
    found = dict(training)
    for part in ("refined", "mode", "config"):
        found |= dict(training.get(part) or {})
    return found


def data_of(training: Mapping[str, Any]) -> str:
    """What the gates were trained on, as far as the run recorded it."""
    found = merged(training)
    if not any(found.get(name) for name in ("data", "labels", "documents", "data_hash")):
        return "What the gates were trained on is not recorded."
    parts = [f"Trained on {one_line(found.get('documents') or 'an unrecorded number of')} documents"]
    if found.get("data"):
        parts.append(f"of `{shown(found['data'])}`")
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


def known(rows: Sequence[Row], method: str) -> str:
    """How far the measurements reach."""
    mine = [row for row in rows if row["method"] == method]
    if not mine:
        return "Nothing is known about their quality on any data."
    names = ", ".join(sorted({one_line(Path(str(row["family"])).name) for row in mine}))
    found = sorted({row["budget"] for row in mine if isinstance(row["budget"], int)})
    reach = f"at budgets of {found[0]} to {found[-1]} slots" if found else "at the budgets above"
    return f"Measured on {names}, {reach}; elsewhere nothing is known."


def chosen_terms(config: GatesConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Budget and options for the example: of the first measurement, else what suits the base model."""
    for row in rows:
        if row["method"] == config.method and isinstance(row["budget"], int):
            rules = dict(row.get("rules") or {})
            return {
                "budget": row["budget"],
                **{name: rules[name] for name in ("slack", "sinks", "recent") if rules.get(name) is not None},
            }
    return {"budget": 64, "slack": 16, "sinks": 4, "recent": 8} if config.base_name == TESTBED else {"budget": 512}


def code_of(config: GatesConfig, source: Address, terms: Mapping[str, Any]) -> str:
    """An example that runs."""
    name, testbed = config.base_name, config.base_name == TESTBED
    revision = f", revision={json.dumps(config.base_revision)}" if config.base_revision else ""
    remark = "" if is_hub_id(name) else "  # a folder: where else to find it is not recorded"
    start = (
        ON_THE_TESTBED
        if testbed
        else ON_A_MODEL.format(base=json.dumps(name or UNKNOWN), revision=revision, remark=remark)
    )
    written = ", ".join(f"{key}={value!r}" for key, value in terms.items())
    return start + THEN.format(
        source=json.dumps(str(source)), terms=written, plain=", add_special_tokens=False" * testbed
    )


def command_of(config: GatesConfig, source: Address, terms: Mapping[str, Any]) -> str:
    """The same on the command line."""
    testbed = config.base_name == TESTBED
    model = f"--model {shlex.quote(config.base_name or UNKNOWN)}"
    prompt = "--task program --seed 3" if testbed else f'{model} --chat --prompt "Why is the sky blue?"'
    return f"learnevict infer {prompt} --ckpt {source} --budget {terms['budget']}"


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
