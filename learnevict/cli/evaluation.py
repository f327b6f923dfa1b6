"""The work of `learnevict eval` once its options are read: the model, its tasks and methods, and the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from learnevict.cli.eval import KEPT, MethodOptions
from learnevict.cli.opened_model import OpenedModel, open_model, shipped
from learnevict.cli.options import ModelOptions, check_method
from learnevict.cli.output import progress, say
from learnevict.cli.tasks import PUZZLES, TESTBED, TaskOptions, listed
from learnevict.errors import DataError, GateError, UsageError
from learnevict.evals import perplexity as texts
from learnevict.evals import tuning
from learnevict.evals.methods import COMPARISON, FULL, GOLDEN, EvaluatedMethod, EvaluationSettings, evaluated_method
from learnevict.evals.plan import EvaluatedModel, Plan, check, count
from learnevict.evals.records import MARK, Row, write_rows
from learnevict.evals.suite import read_earlier, run
from learnevict.evals.tasks import Task, family_tasks, fingerprint, resolve
from learnevict.evals.tasks.bookkeeping import BookkeepingTask
from learnevict.evals.tasks.contexts import Haystack
from learnevict.evals.tasks.mathematics import MathTask, Problem, read_problem
from learnevict.evals.tasks.procedures import ProcedureTask
from learnevict.evals.tasks.puzzles import PuzzleTask
from learnevict.evals.tasks.retrieval import MODES, RetrievalTask
from learnevict.evals.tasks.texts import TextTask
from learnevict.files import check as check_file
from learnevict.files import locked, special
from learnevict.hub import Gates, weight_hash
from learnevict.infer.prompts import parse_row, read_lines
from learnevict.parts.options import DROP, EQUAL
from learnevict.testbed import FAMILIES

DEFAULT_METHODS = (
    "full",
    "random",
    "random+prompt",
    "lexical",
    "streaming_llm",
    "h2o",
    "snapkv",
    "golden",
    "foresightkv",
)
PLAIN_METHODS = ("full", "random", "streaming_llm", "h2o", "snapkv", "keydiff")
"""Of retrieval and perplexity, where no prompt stands before what is compressed; mathematics has the second one too."""


def compare(
    model: ModelOptions,
    options: MethodOptions,
    asked: TaskOptions,
    content: Sequence[str],
    given: dict[str, Any],
    out: Path | None,
    resume: bool,
) -> list[Row]:
    """Returns the rows of a comparison on tasks.

    Args:
        content: the texts of the user's file or folder of prose.
        given: what was said of samples and answers, by the names of Plan; `split` is the testbed's.

    Raises:
        UsageError: a model of another vocabulary, or an `out` that is not to be gone on with.
        DataError: `out` holds something else than rows, or the user's files are not what the tasks need.
    """
    read_earlier(out, resume=resume)
    budgets = listed(options.budgets)
    if asked.group == TESTBED:
        which = {"split": given.pop("split", "test"), "length": asked.length or "normal"}
        tasks: tuple[Task, ...] = family_tasks(listed(asked.families) or FAMILIES, **which)
        plan = Plan(tasks, budgets, settings=_settings(options, COMPARISON), **given)
        opened = _opened(model, options)
        if not opened.speaks_testbed:
            raise UsageError(
                f"{model.model!r} does not speak the testbed's words; evaluate it on a text: --tasks perplexity --text FILE or "
                "--tasks needle --text FILE"
            )
    else:
        opened = _opened(model, options)
        tasks = other_tasks(opened, asked, content)
        settings = _settings(options, replace(COMPARISON, slack=usual_slack(tasks, budgets)))
        usual: dict[str, Any] = {"num_samples": 50, "batch_size": 8, "oracle": False}
        plan = Plan(tasks, budgets, settings=settings, **(usual | given))
        say(
            f"tokens between evictions: {settings.slack}; {settings.sinks} first and {settings.recent} last tokens always stay"
        )
    usual_methods = {TESTBED: DEFAULT_METHODS, "problems": (*PLAIN_METHODS, f"random{KEPT}")}
    usual_methods |= dict.fromkeys(("puzzles", "bookkeeping", "procedures"), usual_methods["problems"])
    field = evaluated_methods(opened, options, usual_methods.get(asked.group, PLAIN_METHODS))
    check(plan, field)
    tuned = {budget for one in field for _, budget in one.tuned}
    if options.tuned and (rest := [budget for budget in plan.budgets if budget not in tuned]):
        say(f"no tuned settings for budgets {', '.join(rest)}: methods use their own there")
    subject = EvaluatedModel(opened.model, opened.tokenizer, opened.name)
    with progress(count(plan, field)) as advance:
        return run(plan, subject, field, out, resume=resume, advance=advance)[0]


def other_tasks(opened: OpenedModel, asked: TaskOptions, content: Sequence[str]) -> tuple[Task, ...]:
    """Returns the tasks that are not the testbed's.

    Args:
        content: what perplexity is measured on, or where facts are hidden.

    Raises:
        DataError: the text is too short, or a row is no problem.
    """
    tokenizer: Any = opened.tokenizer
    chat = bool(tokenizer.chat_template) if asked.chat is None else asked.chat
    if asked.group == "retrieval":
        text = "\n".join(content)
        haystack = Haystack(text, lambda part: len(tokenizer(part, add_special_tokens=False).input_ids))
        limit = asked.max_new_tokens or 24
        source = f"{asked.text and asked.text.name} {fingerprint([text])}"
        modes = MODES if asked.question is None else (asked.question.value,)
        return tuple(
            RetrievalTask(
                kind, length, haystack, source, chat=chat, depth=asked.depth, max_new_tokens=limit, modes=modes
            )
            for kind in listed(asked.tasks) for length in asked.lengths
        )  # fmt: skip
    if asked.group == "perplexity":
        read = [tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False) for text in content]
        ids = tuple(one["input_ids"][0] for one in read)
        for one, text in zip(ids, content, strict=True):
            texts.check_known(tokenizer, one, text)
        cut = tuple(one[: asked.max_tokens] for one in ids)
        return (TextTask(str(asked.text and asked.text.name), cut, asked.lengths[0], tokenizer.bos_token_id),)
    if asked.group == "bookkeeping":
        limit = asked.max_new_tokens or 320
        return tuple(BookkeepingTask(name, tokenizer, max_new_tokens=limit) for name in listed(asked.tasks))
    if asked.group == "procedures":
        return tuple(
            ProcedureTask(kind, length, tokenizer, chat, asked.max_new_tokens)
            for kind in listed(asked.tasks) for length in asked.lengths
        )  # fmt: skip
    limit = asked.max_new_tokens or 1024
    if asked.group == "puzzles":
        return tuple(PuzzleTask(name.removeprefix(PUZZLES), chat, limit) for name in listed(asked.tasks))
    assert asked.data is not None
    problems = read_problems(asked.data)
    examples = read_problems(asked.examples)[: asked.shots or 8] if asked.examples else ()
    (name,) = listed(asked.tasks)
    return (MathTask(name, problems, examples, chat=chat, max_new_tokens=limit),)


def read_problems(path: Path) -> tuple[Problem, ...]:
    """Returns the problems of a file of JSON lines. Raises DataError: it cannot be read, or a row is no problem."""
    found: list[Problem] = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            found += [read_problem(parse_row(line))] if line.strip() else []
        except DataError as error:  # noqa: PERF203
            raise DataError(f"line {number} of {str(path)!r} {error}") from error
    return tuple(found)


def usual_slack(tasks: Sequence[Task], budgets: Sequence[str]) -> int:
    """Returns tokens between evictions that leave three quarters of the smallest budget to choose from, at most 128."""
    found = [resolve(budget, task.mean_length) for budget in budgets for task in tasks]
    tokens = [budget for budget in found if isinstance(budget, int)]
    return min([128, *(2 ** int(math.log2(max(budget / 4, 1))) for budget in tokens)])


def compare_on_text(
    model: ModelOptions, options: MethodOptions, text: tuple[str, str], max_tokens: int | None, out: Path | None
) -> list[Row]:
    """Returns the rows of methods on one text, the full cache first; written as they come.

    Args:
        text: its name and its content.

    Raises:
        UsageError: `out` holds something, or is being written by another process.
        DataError: nothing in the text, or `out` cannot be written.
    """
    with locked(out):
        read_earlier(out, resume=False)
        if out is not None:
            check_file(out, MARK)
        opened = _opened(model, options)
        ids = texts.encode(opened.model, opened.tokenizer, text[1], max_tokens=max_tokens)
        usual = COMPARISON if opened.speaks_testbed else EvaluationSettings(slack=128, sinks=None, recent=None)
        settings = _settings(options, usual)
        cells = texts.text_cells(text[0], ids, evaluated_methods(opened, options, ()), listed(options.budgets))
        policies = [texts.policy_for(cell, settings, opened.model, ids) for cell in cells]
        rows: list[Row] = []
        full = None
        with progress(ids.shape[1] * len(cells)) as advance:
            for cell, policy in zip(cells, policies, strict=True):
                label = f"{cell.evaluated_method.name} {cell.asked}"
                found = texts.perplexity(opened.model, ids, policy, advance=lambda n, label=label: advance(label, n))
                full = full or found
                rows.append(texts.text_row(cell, opened.name, found, full))
                if out is not None and (len(rows) == len(cells) or not special(out)):
                    write_rows(out, rows)
    if any(cell.evaluated_method.method == GOLDEN for cell in cells):
        say("golden has read the whole text beforehand: it is a reference, not a method")
    return rows


def _opened(model: ModelOptions, options: MethodOptions) -> OpenedModel:
    """Opens the model, if all methods are there: by name, as gates that ship, or as modules of the user's."""
    for name in listed(options.methods):
        if shipped(name.removesuffix(KEPT)) is None:
            check_method(name.removesuffix(KEPT))
    return open_model(model)


def _settings(options: MethodOptions, usual: EvaluationSettings) -> EvaluationSettings:
    """Returns what was given, over what holds otherwise."""
    found = {name: getattr(options, name) for name in ("sinks", "recent", "slack", "schedule")}
    given = {name: value for name, value in found.items() if value is not None}
    return replace(usual, prompt=options.keep_prompt, **given)


def evaluated_methods(opened: OpenedModel, options: MethodOptions, default: tuple[str, ...]) -> list[EvaluatedMethod]:
    """Returns the methods with their gates and settings.

    Raises:
        GateError: gates missing, of another model, or of a method that is not compared.
        UsageError: two checkpoints of one method, or no such method.
    """
    how: Any = {"allow_other_base": options.allow_other_base}
    gates: dict[str, Gates] = {}
    sources: dict[str, str] = {}
    for source in options.ckpt or ():
        one = Gates.load(source, opened.model, **how)
        if one.method in gates:
            raise UsageError(
                f"--ckpt {sources[one.method]!r} and --ckpt {source!r} both hold gates of {one.method}; a table "
                "shows one of them: evaluate the other in a run of its own, with another --out"
            )
        gates[one.method], sources[one.method] = one, source
    wanted = listed(options.methods) or (*default, *(name for name in gates if name not in default))
    if unused := sorted(set(gates) - {name.removesuffix(KEPT) for name in wanted}):
        raise GateError(
            f"gates were given for {', '.join(unused)}, which --methods leaves out; add the method or drop --ckpt"
        )
    found: dict[str, Gates | None] = {}
    for name in wanted:
        plain = name.removesuffix(KEPT)
        folder = shipped(plain) if opened.speaks_testbed and plain not in gates else None
        found[name] = gates.get(plain) if folder is None else Gates.load(folder, opened.model, **how)
    known = tuning.load() if options.tuned else None
    if known is not None:
        known.check(weight_hash(opened.model), found)
    field: list[EvaluatedMethod] = []
    for name, one in found.items():
        method = name.removesuffix(KEPT) if one is None else one.method
        kept, tuned = {"prompt": True} if name.endswith(KEPT) else {}, known.of(method) if known else {}
        field.append(evaluated_method(method, one, name=name, settings=kept, tuned=tuned, **how))
    return allocated(with_stores(field, listed(options.store or "")), listed(options.allocation or ""))


def with_stores(field: Sequence[EvaluatedMethod], stores: Sequence[str]) -> list[EvaluatedMethod]:
    """Returns methods with each of the stores, named after them ("snapkv+int4"); full and golden once, as they are."""
    if not stores:
        return list(field)
    found: list[EvaluatedMethod] = []
    for one in field:
        for store in ("",) if one.method in (FULL, GOLDEN) else stores:
            name = one.name if store in ("", DROP) else f"{one.name}+{store}"
            found.append(replace(one, name=name, settings={**one.settings, "store": store} if store else one.settings))
    return found


def allocated(field: Sequence[EvaluatedMethod], allocations: Sequence[str]) -> list[EvaluatedMethod]:
    """Returns methods under each of the allocations, named after them ("snapkv+pooled"); those that share budgets out
    themselves once, as they are."""
    if not allocations:
        return list(field)
    found: list[EvaluatedMethod] = []
    for one in field:
        if one.shares_itself:
            found.append(one)
            continue
        for allocation in allocations:
            name = one.name if allocation == EQUAL else f"{one.name}+{Path(allocation).stem}"
            found.append(replace(one, name=name, allocation=allocation))
    if fixed := [one.name for one in found if one.allocation is None and one.method != FULL]:
        say(f"{', '.join(fixed)}: budgets are shared out as the method does it, whatever --allocation says")
    return found
