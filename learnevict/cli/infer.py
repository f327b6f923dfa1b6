"""learnevict infer: generate under a small cache and say what it cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import learnevict.cli.options as o
from learnevict.cli.opened_model import OpenedModel, open_model
from learnevict.cli.output import INTERRUPTED, ResultsFile, say, size, tell
from learnevict.cli.prompts import Request, make_request, make_requests, read_rows, weight_hashes
from learnevict.errors import UsageError
from learnevict.files import locked

NUM_TOGETHER = 8
"""Rows of a batch file at a time."""


def run(
    *,
    prompt: o.PromptOptions,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='JSONL file with rows {"prompt": ...}, {"messages": [...]} or {"task": ..., "seed": ...}.',
            rich_help_panel=o.PROMPT,
        ),
    ] = None,
    eviction: o.EvictionOptions,
    model: o.ModelOptions,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Longest answer.", rich_help_panel=o.MACHINE)
    ] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", rich_help_panel=o.MACHINE)] = 0.0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts of a --batch at a time. [dim]8[/dim]", rich_help_panel=o.MACHINE)
    ] = None,
    as_json: o.AsJson = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write.", rich_help_panel=o.OUTPUT)] = None,
) -> None:
    """Generate text while a policy keeps the cache small. The answer streams; what it cost goes to standard error.

    Examples:

        learnevict infer --task program --seed 3 --budget 48

        learnevict infer --task recall --method h2o --budget 25% --json

        learnevict infer --model Qwen/Qwen3-0.6B --chat --prompt "Why is the sky blue?" --method snapkv --budget 512

        learnevict infer --model ./my-model --ckpt ./my-gates --budget 64MiB --batch rows.jsonl --out answers.jsonl

    A batch goes on where it was interrupted: give the same command again. --prompt - reads standard input.
    --method golden runs every prompt twice, because the oracle has to see the future first.
    """
    check_sources(prompt, batch, out)
    if batch_size is not None and batch is None:
        raise UsageError("--batch-size belongs to --batch: one prompt is one row; drop it")
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    row = prompt.row()
    rows = read_rows(batch) if batch is not None else []
    with locked(out):
        results = ResultsFile(out)
        opened = open_model(model, bars=not as_json).under(eviction)
        if batch is None:
            request = make_request(opened, row, chat=prompt.chat, name="1")
            _answer_one(opened, request, sampling, prompt.seed, as_json)
            return
        settings = {
            **eviction.settings, **sampling, "model": model.model, "dtype": model.dtype.value, "seed": prompt.seed,
            "chat": prompt.chat, "weights": weight_hashes(opened.model, opened.policy),
        }  # fmt: skip
        num_together = batch_size or NUM_TOGETHER
        if temperature > 0:
            settings["batch_size"] = num_together  # rows of a batch share random numbers
        good, bad = make_requests(opened, rows, settings, chat=prompt.chat)
        for line in bad:
            say(f"error: {batch}, {line}")
        _answer_all(opened, good, results, sampling, prompt.seed, num_together)
    if bad:
        say(f"{len(bad)} of {len(rows)} rows could not be read and were left out")
        raise typer.Exit(1)


def check_sources(prompt: o.PromptOptions, batch: Path | None, out: Path | None) -> None:
    """Raises a UsageError unless there is one thing to read, and --out suits it."""
    sources = {"--prompt": prompt.prompt, "--task": prompt.task, "--batch": batch}
    given = [name for name, value in sources.items() if value is not None]
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


def _answer_one(opened: OpenedModel, request: Request, sampling: dict[str, Any], seed: int, as_json: bool) -> None:
    """Streams the answer, then the figures; or prints both as one JSON object."""
    from learnevict.infer.prompts.printing import printer

    if opened.golden:
        say("golden runs twice: first with a full cache, to learn what the future needs, then under that trace")
    streamer = None if as_json else printer(opened.tokenizer)
    (answer,) = opened.answer([request], seed=seed, streamer=streamer, **sampling)
    if as_json:
        tell(json.dumps(answer.record, ensure_ascii=False))
        return
    kind = str(opened.model.dtype).removeprefix("torch.")
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    for line in figures(answer.record, f"{opened.model.device}, {names.get(kind, kind)}"):
        say(line)


def _answer_all(
    opened: OpenedModel,
    requests: list[Request],
    results: ResultsFile,
    sampling: dict[str, Any],
    seed: int,
    batch_size: int,
) -> None:
    """Answers what is not finished yet, writing rows as their batches finish.

    A batch of which some rows are finished is drawn again as a whole if temperature > 0, and only what is missing is
    written: rows share random numbers, so the rest of a batch alone would get other ones.
    """
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    missing = [[one for one in batch if not results.has(one.name, one.key)] for batch in batches]
    todo = [(index, part) for index, part in enumerate(missing) if part]
    count = len(requests) - sum(len(part) for _, part in todo)
    if count:
        say(f"{count} rows are finished in {results} already")
    try:
        for index, part in todo:
            read = batches[index] if sampling["temperature"] > 0 else part
            answers = opened.answer(read, seed=seed + index * batch_size, **sampling)
            for answer in answers:
                if answer.request in part:
                    results.add(answer.record, answer.request.key)
            count += len(part)
            say(f"{count} of {len(requests)} rows, {answers[0].completion.tokens_per_second:.1f} tokens/s")
    except KeyboardInterrupt as error:
        remedy = (
            "the same command goes on from there" if results.path else "with --out FILE the same command could go on"
        )
        say(f"interrupted: {results.num_rows} finished rows are kept in {results}; {remedy}")
        raise typer.Exit(INTERRUPTED) from error


def figures(record: dict[str, Any], device: str) -> list[str]:
    """Returns the lines under an answer, from its record and what it ran on."""
    kept, read = record["kept"], record["prompt_tokens"] + record["tokens_generated"] - 1
    spread = "" if kept["min"] == kept["max"] else f" ({kept['min']} to {kept['max']})"
    asked = record["budget"] if str(record["budget"]) == str(record["budget_tokens"]) else None
    budget = "" if record["budget"] is None else f", budget {record['budget_tokens']}"
    budget += "" if asked or record["budget"] is None else f" = {record['budget']}"
    now, peak, full = (size(record[f"kv_bytes_{name}"]) for name in ("end", "peak", "full"))
    share = record["kv_bytes_peak"] / max(record["kv_bytes_full"], 1)
    lines = [
        f"{record['method']} on {record['model']} ({device}): {record['tokens_generated']} new tokens, "
        f"{record['tokens_per_second']:.1f} tokens/s, {record['prompt_tokens']} prompt tokens in "
        f"{record['prompt_seconds']:.2f} s" + ("" if record["finished"] else "; cut at --max-new-tokens"),
        f"kept per head: {kept['mean']:g}{spread} of {read} tokens{budget}",
        f"keys and values: now {now}, peak {peak}, full cache {full} (peak is {share:.0%} of it)",
    ]
    if "runs" in record:
        same = (
            "the same text"
            if record["agreement"] == 1
            else f"the same text for {record['agreement']:.0%}, then recency"
        )
        lines.append(f"golden ran twice: a full cache for the labels, then under their trace; {same}")
    if "correct" in record:
        lines.append(f"answer: {'right' if record['correct'] else 'wrong'}, expected: {record['expected']}")
    return lines
