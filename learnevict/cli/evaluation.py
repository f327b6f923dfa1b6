"""The work of `learnevict eval` once its options are read: the model, its methods, and the runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from learnevict.cli.eval_options import MethodOptions
from learnevict.cli.opened_model import TESTBED, OpenedModel, open_model
from learnevict.cli.options import ModelOptions
from learnevict.cli.output import progress, say
from learnevict.errors import GateError, UsageError
from learnevict.evals.methods import COMPARISON, FULL, GOLDEN, EvaluatedMethod, EvaluationSettings, evaluated_method
from learnevict.evals.plan import EvaluatedModel, Plan, check, count
from learnevict.evals.records import MARK, Row, write_rows
from learnevict.evals.suite import read_earlier, run
from learnevict.evals.tasks import family_tasks
from learnevict.files import check as check_file
from learnevict.files import locked, special
from learnevict.testbed import FAMILIES

DEFAULT_METHODS = ("full", "random", "lexical", "streaming_llm", "h2o", "snapkv", "golden", "foresightkv")


@dataclass(frozen=True)
class Evaluation:
    """The methods and budgets that a user compares on a model."""

    model: ModelOptions
    methods: MethodOptions
    names: tuple[str, ...]
    budgets: tuple[str, ...]

    @cached_property
    def opened(self) -> OpenedModel:
        """The model, loaded when first needed."""
        return open_model(self.model)

    def settings(self, base: EvaluationSettings) -> EvaluationSettings:
        """Returns what was given, over what holds otherwise."""
        found = {name: getattr(self.methods, name) for name in ("sinks", "recent", "slack")}
        given = {name: value for name, value in found.items() if value is not None}
        return replace(base, prompt=self.methods.keep_prompt, **given)

    def plan(self, families: tuple[str, ...], **fields: Any) -> Plan:
        """Returns a comparison on the testbed under the usual settings."""
        which = {name: fields.pop(name) for name in ("split", "length") if name in fields}
        tasks = family_tasks(families or FAMILIES, **which)
        return Plan(tasks, self.budgets, rules=self.settings(COMPARISON), **fields)

    def evaluated_methods(self, default: tuple[str, ...]) -> list[EvaluatedMethod]:
        """Returns the methods with their gates and settings.

        Raises:
            GateError: gates missing, of another model, or of a method that is not compared.
            UsageError: two checkpoints of one method, or no such method.
        """
        from learnevict import methods
        from learnevict.evals import tuning
        from learnevict.hub import Gates, weight_hash

        for name in self.names:
            if self._shipped_in(name) is None:
                methods.load(name)  # of one's own: imported because it is named here, so that gates may be of it
        opened = self.opened
        gates: dict[str, Gates] = {}
        sources: dict[str, str] = {}
        for source in self.methods.ckpt or ():
            one = Gates.load(source, opened.model, allow_other_base=self.methods.allow_other_base)
            if one.method in gates:
                raise UsageError(
                    f"--ckpt {sources[one.method]!r} and --ckpt {source!r} both hold gates of {one.method}; a table "
                    "shows one of them: evaluate the other in a run of its own, with another --out"
                )
            gates[one.method], sources[one.method] = one, source
        wanted = self.names or (*default, *(name for name in gates if name not in default))
        unused = sorted(set(gates) - set(wanted))
        if unused:
            raise GateError(
                f"gates were given for {', '.join(unused)}, which --methods leaves out; add the method or drop --ckpt"
            )
        known = tuning.load() if self.methods.tuned else None
        found = {name: gates.get(name) or self._shipped(name) for name in wanted}
        if known is not None:
            known.check(weight_hash(opened.model), found)
        of = {name: one.method if one is not None else name for name, one in found.items()}
        return [
            evaluated_method(
                of[name], one, tuned=known.of(of[name]) if known else {}, name=name,
                allow_other_base=self.methods.allow_other_base,
            )
            for name, one in found.items()
        ]  # fmt: skip

    def _shipped_in(self, name: str) -> Path | None:
        """Returns the folder of the testbed's own gates for a learned method or for its stage before refinement ("NAME-sl")."""
        from learnevict.hub import GATES_FOLDER

        folder = GATES_FOLDER / f"{TESTBED}-{name}"
        return folder if Path(name).name == name and self.opened.speaks_testbed and folder.is_dir() else None

    def _shipped(self, name: str) -> Any:
        """Returns these gates; None if there are none."""
        from learnevict.hub import Gates

        folder = self._shipped_in(name)
        if folder is None:
            return None
        return Gates.load(folder, self.opened.model, allow_other_base=self.methods.allow_other_base)

    def testbed(self, plan: Plan, out: Path | None, resume: bool) -> list[Row]:
        """Returns the rows of a comparison on the testbed's tasks.

        Raises:
            UsageError: a model of another vocabulary, --resume without --out, or an `out` that is not to be gone on with.
            DataError: `out` holds something else than rows.
        """
        if resume and out is None:
            raise UsageError("--resume needs the --out of the run to go on with")
        read_earlier(out, resume=resume)
        opened = self.opened
        if not opened.speaks_testbed:
            raise UsageError(
                f"{self.model.model!r} does not speak the testbed's words; evaluate it on a text: --task perplexity --text FILE"
            )
        evaluated_methods = self.evaluated_methods(DEFAULT_METHODS)
        check(plan, evaluated_methods)
        tuned = {budget for one in evaluated_methods for _, budget in one.tuned}
        if self.methods.tuned and (rest := [budget for budget in plan.budgets if budget not in tuned]):
            say(f"no tuned settings for budgets {', '.join(rest)}: methods use their own there")
        subject = EvaluatedModel(opened.model, opened.tokenizer, opened.name)
        with progress(count(plan, evaluated_methods)) as advance:
            return run(plan, subject, evaluated_methods, out, resume=resume, advance=advance)[0]

    def perplexity(self, path: Path, max_tokens: int | None, out: Path | None) -> list[Row]:
        """Returns the rows of methods on one text, the full cache first; written as they come.

        Raises:
            UsageError: `out` holds something, or is being written by another process.
            DataError: the text cannot be read, or `out` cannot be written.
        """
        with locked(out):
            return self._perplexity(path, max_tokens, out)

    def _perplexity(self, path: Path, max_tokens: int | None, out: Path | None) -> list[Row]:
        from learnevict.evals import perplexity as texts

        text = texts.read_text(path)
        read_earlier(out, resume=False)
        if out is not None:
            check_file(out, MARK)
        model = self.opened.model
        ids = texts.encode(model, self.opened.tokenizer, text, max_tokens=max_tokens)
        rules = self.settings(
            COMPARISON if self.opened.speaks_testbed else EvaluationSettings(slack=128, sinks=None, recent=None)
        )
        field = [one for one in self.evaluated_methods(()) if one.method != FULL]
        cells = texts.text_cells(path.name, ids, field, self.budgets)
        policies = [texts.policy_for(cell, rules, model, ids) for cell in cells]
        rows: list[Row] = []
        full = None
        with progress(ids.shape[1] * len(cells)) as advance:
            for cell, policy in zip(cells, policies, strict=True):
                label = f"{cell.evaluated_method.name} {cell.asked}"
                found = texts.perplexity(model, ids, policy, advance=lambda n, label=label: advance(label, n))
                full = full or found
                rows.append(texts.text_row(cell, self.opened.name, found, full))
                if out is not None and (len(rows) == len(cells) or not special(out)):
                    write_rows(out, rows)
        if any(one.method == GOLDEN for one in field):
            say("golden has read the whole text beforehand: it is a reference, not a method")
        return rows
