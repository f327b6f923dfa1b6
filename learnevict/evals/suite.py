"""The suite: methods x tasks x budgets on the same samples, teacher-forced and in free generation, crash-safe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from learnevict.errors import DataError, UsageError
from learnevict.evals.generation import answer, answer_golden
from learnevict.evals.methods import EvaluatedMethod
from learnevict.evals.plan import Cell, EvaluatedModel, Plan, cells, check, configuration
from learnevict.evals.records import Row, make_row, read_rows, write_rows
from learnevict.evals.sample_log import SampleLog, log_path
from learnevict.evals.tasks import SHARED_MODES, AnsweredTask, MeasuredTask, ReferenceTask, Task, TextBatch
from learnevict.evals.teacher_forced import measure, measure_golden, reference
from learnevict.files import locked, special, writing
from learnevict.methods.golden import from_labels
from learnevict.oracle.reference import Reference

Advance = Callable[[str, int], None]
MOST_BATCHES = 32
"""Whose texts and labels are kept in memory; 50 samples of the testbed take some 30 MB."""


def run(
    plan: Plan,
    subject: EvaluatedModel,
    evaluated_methods: Sequence[EvaluatedMethod],
    out: Path | None = None,
    *,
    resume: bool = False,
    advance: Advance | None = None,
) -> tuple[list[Row], SampleLog]:
    """Runs what is missing and returns a row per method, task and budget, and the per-sample numbers behind them.

    Args:
        out: rows are written here as JSON lines after every cell, beside those that were there, per-sample numbers to
            `log_path(out)` after every batch. To a device or a pipe the rows alone are written, at the end.
        resume: go on with a run that was interrupted, or add methods, tasks or budgets to it. Samples can be added too,
            and what was measured without the oracle is measured again if the plan asks for it.
        advance: called with what is being run and the number of samples just done, those of earlier runs included.

    Raises:
        BudgetError: a budget that some method cannot be held to; nothing has been run then.
        UsageError: an impossible plan, or `out` belongs to another one or is not to be gone on with, would hold rows of
            other samples beside the new ones, or is being written by another process.
        DataError: `out` cannot be written, or holds something else than rows.
    """
    check(plan, evaluated_methods)
    if out is not None and special(out):
        rows, log = run(plan, subject, evaluated_methods, advance=advance)
        write_rows(out, rows)
        return rows, log
    if out is not None:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out), locked(log_path(out) if out else None):  # r.json and r.jsonl have one log
        earlier, record = read_earlier(out, resume=resume), log_path(out) if out else None
        if earlier and record is not None and not record.exists():
            raise UsageError(
                f"{out} holds rows, but {record}, the numbers behind them, is missing; choose another --out"
            )
        earlier = _of_these_samples(earlier, plan, evaluated_methods, str(out))
        log = SampleLog(record, configuration(plan, subject), resume=resume)
        rows: list[Row] = []
        for task in plan.tasks:
            done: list[Cell] = []
            reader = _Reader(plan, subject, task)
            for cell in cells(plan, evaluated_methods, task):
                for mode in cell.modes:
                    _run_cell(reader, cell, mode, log, advance)
                if cell.evaluated_method in evaluated_methods:
                    done.append(cell)
                    rows.append(make_row(log, cell, plan, subject))
                    _write(out, earlier, rows)
            rows[-len(done) :] = [
                make_row(log, cell, plan, subject) for cell in done
            ]  # golden and random are there now
            _write(out, earlier, rows)
    return rows, log


def _write(out: Path | None, earlier: Sequence[Row], rows: Sequence[Row]) -> None:
    """Writes rows of both; a newer one takes the place of the first older one of its cell, and no other is lost."""
    if out is not None:
        fresh = {_place(row): row for row in rows}
        kept = [fresh.pop(_place(row), row) for row in earlier]
        write_rows(out, [*kept, *fresh.values()])


def _place(row: Row) -> tuple[Any, ...]:
    """Returns what a row is about, as Cell.place."""
    return tuple(row.get(name) for name in ("family", "method", "budget", "budget_share"))


def read_earlier(path: Path | None, *, resume: bool) -> list[Row]:
    """Returns rows of an earlier run that a run is going to keep; [] where nothing is yet.

    Raises:
        UsageError: the file holds something, and the run is not to go on with it.
        DataError: it holds something else than rows.
    """
    try:
        if path is None or special(path) or not path.exists() or (path.is_file() and not path.stat().st_size):
            return []
    except OSError as error:
        raise DataError(f"cannot write {str(path)!r}: {error.strerror}; choose another --out") from error
    if not resume:
        raise UsageError(
            f"{path} holds something already; choose another --out, or go on with a run of the testbed (--resume)"
        )
    try:
        return read_rows(path)
    except DataError as error:
        raise DataError(f"{error}; choose another --out") from error


def _of_these_samples(
    earlier: Sequence[Row], plan: Plan, evaluated_methods: Sequence[EvaluatedMethod], out: str
) -> list[Row]:
    """Returns earlier rows over the plan's samples; others are left out if the run makes all of them anew.

    Their numbers stay in the log: the same command with the former samples brings them back at once.

    Raises:
        UsageError: some would stay, and one table would hold rows of different samples.
    """
    planned = (cell for task in plan.tasks for cell in cells(plan, evaluated_methods, task))
    mine = {cell.place for cell in planned if cell.evaluated_method in evaluated_methods}
    samples = {id(row): (row.get("samples"), row.get("seed", 0)) for row in earlier}
    wanted = (plan.num_samples, plan.seed)
    if stay := [row for row in earlier if samples[id(row)] != wanted and _place(row) not in mine]:
        names = ", ".join(dict.fromkeys(f"{row['method']} on {row['family']}" for row in stay))
        num, seed = samples[id(stay[0])]
        raise UsageError(
            f"{out} holds rows over {num} samples from seed {seed} ({names}), and this run would put some over "
            f"{plan.num_samples} from seed {plan.seed} beside them; keep to --samples {num} --seed {seed}, or name all its "
            "methods, families and budgets to measure them over the new samples, or choose another --out"
        )
    return [row for row in earlier if samples[id(row)] == wanted]


class _Reader:
    """The texts of one task, and what the oracle says of them: both are made once for all methods and budgets."""

    def __init__(self, plan: Plan, subject: EvaluatedModel, task: Task) -> None:
        self.plan, self.subject, self.task = plan, subject, task
        self.kept: dict[tuple[int, ...], tuple[TextBatch, Reference | None]] = {}

    def texts(self, seeds: Sequence[int]) -> tuple[TextBatch, Reference | None]:
        """Returns the reference texts of these seeds, aligned, with labels if the plan asks for them."""
        key = tuple(seeds)
        if key not in self.kept:
            model, settings = self.subject.model, self.plan.settings
            texts = cast(ReferenceTask, self.task).reference(self.subject.tokenizer, self.task.samples(seeds))
            texts = texts.to(model.device).aligned(settings.block)
            while len(self.kept) >= MOST_BATCHES:
                self.kept.pop(next(iter(self.kept)))
            self.kept[key] = texts, reference(model, texts, settings) if self.plan.oracle else None
        return self.kept[key]


def _run_cell(reader: _Reader, cell: Cell, mode: str, log: SampleLog, advance: Advance | None) -> None:
    key, plan = cell.key(mode), reader.plan
    # Whatever the policy, a batch measured beside the oracle has this column; the full cache is not measured so.
    columns = ("attention_kept",) if plan.oracle and mode == "teacher" and cell.budget is not None else ()
    missing = log.missing(key, plan.seeds, cell.identity, columns)
    label = f"{cell.family} {cell.evaluated_method.name} {cell.asked}"
    if advance is not None:
        advance(label, plan.num_samples - len(missing))
    for start in range(0, len(missing), plan.batch_size):
        seeds = missing[start : start + plan.batch_size]
        log.add(key, seeds, _run_batch(reader, cell, mode, seeds))
        if advance is not None:
            advance(label, len(seeds))


def _run_batch(reader: _Reader, cell: Cell, mode: str, seeds: list[int]) -> Mapping[str, Any]:
    """Returns one batch of one cell: what goes into the log."""
    plan, task, model, tokenizer = reader.plan, reader.task, reader.subject.model, reader.subject.tokenizer
    golden, rules = cell.budget if cell.golden else None, cell.evaluated_method.rules(plan.settings)
    policy = None
    if cell.budget is not None and golden is None:
        policy = cell.evaluated_method.policy(cell.budget, plan.settings, cell.options)
    if mode == "teacher":
        texts, beside = reader.texts(seeds)
        if golden is not None:
            return measure_golden(model, texts, golden, rules, beside=beside)
        return measure(model, texts, policy, beside)
    if mode not in SHARED_MODES:
        measured, samples = cast(MeasuredTask, task), task.samples(seeds)
        if golden is not None:
            future = measured.future(mode, model, tokenizer, samples, rules.block)
            policy = from_labels(golden, future, **rules.options)
        return measured.measure(mode, model, tokenizer, samples, policy)
    task = cast(AnsweredTask, task)
    sampling = {"max_new_tokens": task.max_new_tokens, "temperature": plan.temperature, "seed": seeds[0]}
    if golden is not None:
        return answer_golden(model, tokenizer, task, task.samples(seeds), golden, rules, **sampling)
    return answer(model, tokenizer, task, task.samples(seeds), policy, tries=plan.tries, **sampling)
