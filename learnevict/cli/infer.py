"""learnevict infer: generate under a small cache and say what it cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import learnevict.cli.options as o
from learnevict.cli.generation import Generator, figures
from learnevict.cli.output import INTERRUPTED, ResultsFile, say, tell
from learnevict.cli.policy_choice import OpenedModel, PolicyChoice, open_model
from learnevict.cli.prompts import (
    Request,
    check_chat,
    make_request,
    make_requests,
    read_prompt,
    read_rows,
    weights_behind,
)
from learnevict.errors import UsageError
from learnevict.files import locked

NUM_TOGETHER = 8
"""Rows of a batch file at a time."""


def run(
    prompt: o.Prompt = None,
    task: o.Task = None,
    batch: Annotated[
        Path | None,
        typer.Option(help='JSONL file with rows {"prompt": ...}, {"messages": [...]} or {"task": ..., "seed": ...}.',
                     rich_help_panel=o.PROMPT),
    ] = None,
    seed: o.Seed = 0,
    chat: o.Chat = False,
    method: o.Method = None,
    budget: o.Kept = None,
    ckpt: o.Checkpoint = None,
    allow_other_base: o.OtherBase = False,
    sinks: o.Sinks = None,
    recent: o.Recent = None,
    slack: o.Slack = None,
    schedule: o.Schedule = None,
    keep_prompt: o.KeepPrompt = False,
    variant: o.Variant = None,
    model: o.Model = "testbed",
    device: o.Device = "auto",
    dtype: o.Dtype = o.Precision.auto,
    allow_pickle: o.AllowPickle = False,
    max_new_tokens: o.NewTokens = 400,
    temperature: o.Temperature = 0.0,
    batch_size: o.BatchSize = None,
    as_json: o.AsJson = False,
    out: o.Out = None,
) -> None:  # fmt: skip
    """Generate text while a policy keeps the cache small. The answer streams; what it cost goes to standard error.

    Examples:

        learnevict infer --task program --seed 3 --budget 48

        learnevict infer --task recall --method h2o --budget 25% --json

        learnevict infer --model Qwen/Qwen3-0.6B --chat --prompt "Why is the sky blue?" --method snapkv --budget 512

        learnevict infer --model ./my-model --ckpt ./my-gates --budget 64MiB --batch rows.jsonl --out answers.jsonl

    A batch goes on where it was interrupted: give the same command again. --prompt - reads standard input.
    --method golden runs every prompt twice, because the oracle has to see the future first.
    """
    _one_source(prompt=prompt, task=task, batch=batch, out=out)
    check_chat(chat=chat, task=task)
    if batch_size is not None and batch is None:
        raise UsageError("--batch-size belongs to --batch: one prompt is one row; drop it")
    choice = PolicyChoice(
        method, ckpt, budget, allow_other_base, sinks, recent, slack, None if schedule is None else schedule.value,
        keep_prompt or None, variant,
    )  # fmt: skip
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    rows = read_rows(batch) if batch is not None else []
    with locked(out):
        results = ResultsFile(out)
        content = {"task": task, "seed": seed} if task is not None else {"prompt": read_prompt(prompt or "")}
        opened = open_model(model, device, dtype.value, bars=not as_json, allow_pickle=allow_pickle)
        answering = Generator(opened, choice, sampling)
        if batch is None:
            _answer_one(answering, make_request(opened, content, chat=chat, name="1"), seed, as_json)
            return
        settings = {**asdict(choice), **sampling, "model": model, "dtype": dtype.value, "seed": seed, "chat": chat}
        settings["weights"] = weights_behind(opened.model, answering.policy)
        size = batch_size or NUM_TOGETHER
        if temperature > 0:
            settings["batch_size"] = size  # who is drawn together shares random numbers
        good, bad = make_requests(opened, rows, settings, chat=chat)
        for line in bad:
            say(f"error: {batch}, {line}")
        _answer_all(answering, good, results, seed, size)
    if bad:
        say(f"{len(bad)} of {len(rows)} rows could not be read and were left out")
        raise typer.Exit(1)


def _one_source(*, prompt: str | None, task: str | None, batch: Path | None, out: Path | None) -> None:
    given = [name for name, value in (("--prompt", prompt), ("--task", task), ("--batch", batch)) if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise UsageError(
            f"give one of --prompt TEXT, --task FAMILY and --batch FILE, not {found}; try --task program --seed 3"
        )
    if out is not None and batch is not None and out.resolve() == batch.resolve():
        raise UsageError("--out would overwrite the rows of --batch; choose another file")
    if out is not None and batch is None:
        raise UsageError(
            "--out belongs to --batch; for one prompt redirect standard output, with --json for the figures"
        )


def _answer_one(answering: Generator, request: Request, seed: int, as_json: bool) -> None:
    """Stream the answer, then the figures; or both as one JSON object."""
    from learnevict.infer.prompts.printing import printer

    opened = answering.opened
    if answering.golden:
        say("golden runs twice: first with a full cache, to learn what the future needs, then under that trace")
    streamer = None if as_json else printer(opened.tokenizer)
    (answer,) = answering([request], seed=seed, streamer=streamer)
    record = answering.record(answer)
    if as_json:
        tell(json.dumps(record, ensure_ascii=False))
        return
    for line in figures(record, where(opened)):
        say(line)


def _answer_all(
    answering: Generator, requests: list[Request], results: ResultsFile, seed: int, batch_size: int
) -> None:
    """Answer what is not finished yet, writing rows as their batches finish.

    A batch of which some rows are finished is drawn again as a whole if temperature > 0, and only what is missing is
    written: rows share random numbers, so the rest of a batch alone would get other ones.
    """
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    todo = [(index, part) for index, batch in enumerate(batches) if (part := _unfinished(batch, results))]
    count = len(requests) - sum(len(part) for _, part in todo)
    drawn = answering.sampling["temperature"] > 0
    if count:
        say(f"{count} rows are finished in {results} already")
    try:
        for index, part in todo:
            answers = answering(batches[index] if drawn else part, seed=seed + index * batch_size)
            missing = {request.name for request in part}
            for answer in answers:
                if answer.request.name in missing:
                    results.add(answering.record(answer), answer.request.key)
            count += len(part)
            say(f"{count} of {len(requests)} rows, {answers[0].completion.tokens_per_second:.1f} tokens/s")
    except KeyboardInterrupt as error:
        remedy = (
            "the same command goes on from there" if results.path else "with --out FILE the same command could go on"
        )
        say(f"interrupted: {results.num_rows} finished rows are kept in {results}; {remedy}")
        raise typer.Exit(INTERRUPTED) from error


def _unfinished(batch: list[Request], results: ResultsFile) -> list[Request]:
    return [request for request in batch if not results.has(request.name, request.key)]


def where(opened: OpenedModel) -> str:
    """Device and number format of a model."""
    names: dict[str, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    kind: Any = str(opened.model.dtype).removeprefix("torch.")
    return f"{opened.model.device}, {names.get(kind, kind)}"
