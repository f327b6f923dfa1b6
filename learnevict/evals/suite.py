"""The testbed suite: methods x families x budgets on unseen samples, teacher-forced and in free generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from learnevict import testbed
from learnevict.errors import UsageError
from learnevict.evals.budgets import longest_response
from learnevict.evals.generation import Answers, Decoding, answer, answer_golden
from learnevict.evals.methods import GOLDEN, EvaluatedMethod
from learnevict.evals.plan import Cell, EvaluatedModel, Plan, cells, check, configuration
from learnevict.evals.sample_log import SampleLog
from learnevict.evals.summaries import Row, joined, make_row, place, place_of, read_earlier, write_rows
from learnevict.evals.teacher_forced import BytesHeld, Scores, TextBatch, measure, measure_golden, read, reference
from learnevict.files import locked, special, writing
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
    """Runs what is missing and returns a row per method, family and budget.

    Args:
        out: rows are written here as JSON lines after every cell, beside those that were there, per-sample numbers to
            `log_path(out)` after every batch. To a device or a pipe the rows alone are written, at the end.
        resume: go on with a run that was interrupted, or add methods, families or budgets to it. Samples can be added too,
            and what was measured without the oracle is measured again if the plan asks for it.
        advance: called with what is being run and the number of samples just done, those of earlier runs included.

    Returns:
        Rows (see rows.make_row) and the per-sample numbers behind them.

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
        return _run(plan, subject, evaluated_methods, out, resume, advance)


def _run(
    plan: Plan,
    subject: EvaluatedModel,
    evaluated_methods: Sequence[EvaluatedMethod],
    out: Path | None,
    resume: bool,
    advance: Advance | None,
) -> tuple[list[Row], SampleLog]:
    earlier, record = read_earlier(out, resume=resume), log_path(out) if out else None
    if earlier and record is not None and not record.exists():
        raise UsageError(f"{out} holds rows, but {record}, the numbers behind them, is missing; choose another --out")
    earlier = of_these_samples(earlier, plan, evaluated_methods, str(out))
    log = SampleLog(record, configuration(plan, subject), resume=resume)
    rows: list[Row] = []
    for family in plan.families:
        done: list[Cell] = []
        reader = Reader(plan, subject, family)
        for cell in cells(plan, evaluated_methods, family):
            for mode in cell.modes:
                _run_cell(reader, cell, mode, log, advance)
            if cell.evaluated_method in evaluated_methods:
                done.append(cell)
                rows.append(make_row(log, cell, plan, subject))
                _write(out, earlier, rows)
        rows[-len(done) :] = [make_row(log, cell, plan, subject) for cell in done]  # golden and random are there now
        _write(out, earlier, rows)
    return rows, log


def _write(out: Path | None, earlier: Sequence[Row], rows: Sequence[Row]) -> None:
    if out is not None:
        write_rows(out, joined(earlier, rows))


def of_these_samples(
    earlier: Sequence[Row], plan: Plan, evaluated_methods: Sequence[EvaluatedMethod], out: str
) -> list[Row]:
    """Returns earlier rows over the plan's samples; others are left out if the run makes all of them anew.

    Their numbers stay in the log: the same command with the former samples brings them back at once.

    Raises:
        UsageError: some would stay, and one table would hold rows of different samples.
    """
    mine = {
        place_of(cell)
        for family in plan.families
        for cell in cells(plan, evaluated_methods, family)
        if cell.evaluated_method in evaluated_methods
    }
    wanted = (plan.num_samples, plan.seed)
    if stay := [row for row in earlier if samples_of(row) != wanted and place(row) not in mine]:
        names = ", ".join(dict.fromkeys(f"{row['method']} on {row['family']}" for row in stay))
        num, seed = samples_of(stay[0])
        raise UsageError(
            f"{out} holds rows over {num} samples from seed {seed} ({names}), and this run would put some over "
            f"{plan.num_samples} from seed {plan.seed} beside them; keep to --samples {num} --seed {seed}, or name all its "
            "methods, families and budgets to measure them over the new samples, or choose another --out"
        )
    return [row for row in earlier if samples_of(row) == wanted]


def samples_of(row: Row) -> tuple[Any, Any]:
    """Returns how many samples a row is about, and the seed of the first."""
    return row.get("samples"), row.get("seed", 0)


def log_path(out: Path) -> Path:
    """Returns where the per-sample numbers behind `out` are kept."""
    return out.with_name(f"{out.stem}.samples.jsonl")


class Reader:
    """The texts of one family, and what the oracle says of them: both are made once for all methods and budgets."""

    def __init__(self, plan: Plan, subject: EvaluatedModel, family: str) -> None:
        self.plan, self.subject, self.family = plan, subject, family
        self.kept: dict[tuple[int, ...], tuple[TextBatch, Reference | None]] = {}

    def samples(self, seeds: Sequence[int]) -> list[testbed.Sample]:
        """Returns the samples of these seeds."""
        plan = self.plan
        return [testbed.generate(self.family, seed, split=plan.split, length=plan.length) for seed in seeds]

    def texts(self, seeds: Sequence[int]) -> tuple[TextBatch, Reference | None]:
        """Returns their texts, aligned, with labels if the plan asks for them."""
        key = tuple(seeds)
        if key not in self.kept:
            model, rules = self.subject.model, self.plan.rules
            texts = read(self.subject.tokenizer, self.samples(seeds), model.device).aligned(rules.block)
            while len(self.kept) >= MOST_BATCHES:
                self.kept.pop(next(iter(self.kept)))
            self.kept[key] = texts, reference(model, texts, rules) if self.plan.oracle else None
        return self.kept[key]


def _run_cell(reader: Reader, cell: Cell, mode: str, log: SampleLog, advance: Advance | None) -> None:
    key, plan = cell.key(mode), reader.plan
    missing = log.missing(key, plan.seeds, cell.identity, _oracle_columns(cell, mode, plan))
    label = f"{cell.family} {cell.evaluated_method.name} {cell.asked}"
    if advance is not None:
        advance(label, plan.num_samples - len(missing))
    for start in range(0, len(missing), plan.batch_size):
        seeds = missing[start : start + plan.batch_size]
        log.add(key, seeds, _run_batch(reader, cell, mode, seeds))
        if advance is not None:
            advance(label, len(seeds))


def _oracle_columns(cell: Cell, mode: str, plan: Plan) -> tuple[str, ...]:
    """Returns the columns that a batch measured beside the oracle has whatever the policy; none for the full cache."""
    return ("attention_kept",) if plan.oracle and mode == "teacher" and cell.budget is not None else ()


def _run_batch(reader: Reader, cell: Cell, mode: str, seeds: list[int]) -> dict[str, Any]:
    """Returns one batch of one cell: what goes into the log."""
    plan, model, tokenizer = reader.plan, reader.subject.model, reader.subject.tokenizer
    rules = plan.rules
    golden = cell.budget if cell.evaluated_method.method == GOLDEN and isinstance(cell.budget, int) else None
    policy = None
    if cell.budget is not None and golden is None:
        policy = cell.evaluated_method.policy(cell.budget, rules, cell.options)
    if mode == "teacher":
        texts, beside = reader.texts(seeds)
        if golden is not None:
            return _scores(measure_golden(model, texts, golden, rules, verify=plan.seed in seeds, beside=beside))
        return _scores(measure(model, texts, policy, beside))
    limit = 2 * longest_response(cell.family, plan.length)
    decoding, samples = Decoding(limit, plan.temperature, plan.tries, seeds[0]), reader.samples(seeds)
    if golden is not None:
        return _answers(answer_golden(model, tokenizer, samples, golden, rules, decoding))
    return _answers(answer(model, tokenizer, samples, policy, decoding))


def _scores(scores: Scores) -> dict[str, Any]:
    loss = [round(value, 6) for value in scores.loss]
    given = {"right": scores.right, "seen": scores.seen, "loss": loss, "spoken": scores.loss_tokens}
    chosen = {} if scores.choices is None else {name: _short(part) for name, part in vars(scores.choices).items()}
    return {**given, **{name: part for name, part in chosen.items() if part}, **_held(scores.storage)}


def _short(values: Tensor) -> list[float]:
    """Returns six digits of each; [] if there are none (NaN)."""
    return [float(f"{value:.6g}") for value in values.tolist() if value == value]


def _answers(answers: Answers) -> dict[str, Any]:
    given: dict[str, Any] = {"exact": answers.exact, "tokens": answers.tokens}
    given["seconds"] = answers.seconds / len(answers.exact)
    if answers.agreed is not None:
        given["agreed"] = answers.agreed
    return {**given, **_held(answers.storage)}


def _held(storage: BytesHeld | None) -> dict[str, float]:
    return {} if storage is None else {"peak": storage.peak, "end": storage.end, "full": storage.full}
