"""learnevict infer and viz: generate under a small cache and say what it cost, or show what each head keeps."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

import learnevict.cli.options as o
from learnevict.cli.opened_model import OpenedModel, open_model
from learnevict.cli.output import INTERRUPTED, ResultsFile, say, tell
from learnevict.cli.prompts import Request, make_request, make_requests, read_rows, weight_hashes
from learnevict.config import readable_bytes
from learnevict.errors import UsageError
from learnevict.files import PAGE, check, locked, write
from learnevict.infer.prompts import read_file

EARLY = (
    "evictions began before the chat had been read to its end, where the question often stands: what it needs may be gone. "
    "--schedule prefill_end reads the prompt first (and holds it whole once), --keep-prompt never evicts it"
)
NUM_TOGETHER = 8
"""Rows of a batch file at a time."""


OPTIONS: dict[str, Any] = {
    "batch": o.option(o.PROMPT, 'JSONL file with rows {"prompt": ...}, {"messages": [...]} or {"task": ..., "seed": '
        "...}."),
    "infer.max_new_tokens": o.option(o.MACHINE, "Longest answer.", "--max-new-tokens", "-n", min=1),
    "temperature": o.option(o.MACHINE, "0 takes the likeliest token.", min=0.0),
    "batch_size": o.option(o.MACHINE, "Prompts of a --batch at a time. [dim]8[/dim]", min=1),
    "infer.out": o.option(o.OUTPUT, "File to write.", "--out", "-o"),
    "file": o.option(o.PROMPT, "A text file, UTF-8.", "--file", "-f"),
    "viz.max_new_tokens": o.option(o.MACHINE, "Let the model answer under the policy; 0 shows the text as it is (a "
        "task with its reference answer).", "--max-new-tokens", "-n", min=0),
    "viz.out": o.option(o.OUTPUT, "The page to write.", "--out", "-o"),
}  # fmt: skip


def infer(
    *,
    prompt: o.PromptOptions,
    batch: Path | None = None,
    eviction: o.EvictionOptions,
    model: o.ModelOptions,
    max_new_tokens: int = 400,
    temperature: float = 0.0,
    batch_size: int | None = None,
    kernels: o.KernelUse = o.KernelUse.auto,
    as_json: bool = False,
    out: Path | None = None,
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
    _check_sources(prompt, batch, out, batch_size)
    if eviction.full and kernels is o.KernelUse.on:
        raise UsageError(
            "--kernels on without --budget: kernels decode from evicting caches, a full one has its own way"
        )
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if batch is None:
        row = prompt.row()
        opened = open_model(model, bars=not as_json).under(eviction)
        request = make_request(opened, row, chat=prompt.chat, name="1")
        with _decoding(kernels):
            _answer_one(opened, request, as_json, seed=prompt.seed, **sampling)
        return
    rows, num_together = read_rows(batch), batch_size or NUM_TOGETHER
    with locked(out):
        results = ResultsFile(out)
        opened = open_model(model).under(eviction)
        settings = {
            **eviction.settings, **sampling, "model": model.model, "dtype": model.dtype.value, "seed": prompt.seed,
            "chat": prompt.chat, "weights": weight_hashes(opened.model, opened.policy),
        }  # fmt: skip
        if temperature > 0:
            settings["batch_size"] = num_together  # rows of a batch share random numbers
        good, bad = make_requests(opened, rows, settings, chat=prompt.chat)
        for line in bad:
            say(f"error: {batch}, {line}")
        batches = [good[start : start + num_together] for start in range(0, len(good), num_together)]
        with _decoding(kernels):
            _answer_all(opened, batches, results, sampling, prompt.seed)
    if bad:
        say(f"{len(bad)} of {len(rows)} rows could not be read and were left out")
        raise typer.Exit(1)


def _check_sources(prompt: o.PromptOptions, batch: Path | None, out: Path | None, batch_size: int | None) -> None:
    """Raises a UsageError unless there is one thing to read, and --out and --batch-size suit it."""
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
    if batch_size is not None and batch is None:
        raise UsageError("--batch-size belongs to --batch: one prompt is one row; drop it")


@contextmanager
def _decoding(kernels: o.KernelUse) -> Generator[None]:
    """Makes the caches of what is answered inside decode with kernels or without."""
    from learnevict.ops import using_kernels

    with using_kernels(kernels.value):
        yield


def _answer_one(opened: OpenedModel, request: Request, as_json: bool, **sampling: Any) -> None:
    """Streams the answer, then the figures; or prints both as one JSON object."""
    from learnevict.infer.generate import printer

    if opened.eviction.golden:
        say(
            "golden runs twice: first with a full cache, to learn what the future needs, then under eviction that knows it"
        )
    streamer = None if as_json else printer(opened.tokenizer)
    ((_, record),) = opened.answer([request], streamer=streamer, **sampling)
    if opened.begins_early(request, record):
        say(f"warning: {EARLY}")
    if as_json:
        tell(json.dumps(record, ensure_ascii=False))
        return
    kind = str(opened.model.dtype).removeprefix("torch.")
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    for line in figures(record, f"{opened.model.device}, {names.get(kind, kind)}"):
        say(line)


def _answer_all(
    opened: OpenedModel, batches: list[list[Request]], results: ResultsFile, sampling: dict[str, Any], seed: int
) -> None:
    """Answers what is not finished yet, writing rows as their batches finish.

    A batch of which some rows are finished is drawn again as a whole if temperature > 0, and only what is missing is
    written: rows share random numbers, so the rest of a batch alone would get other ones.
    """
    missing = [[one for one in batch if not results.has(one.name, one.key)] for batch in batches]
    total = sum(map(len, batches))
    count = total - sum(map(len, missing))
    if count:
        say(f"{count} rows are finished in {results} already")
    begins, early = 0, False
    try:
        for batch, part in zip(batches, missing, strict=True):
            if part:
                read = batch if sampling["temperature"] > 0 else part
                answers = opened.answer(read, seed=seed + begins, **sampling)
                for request, (_, record) in zip(read, answers, strict=True):
                    early = early or opened.begins_early(request, record)
                    if request in part:
                        results.add(record, request.key)
                count += len(part)
                say(f"{count} of {total} rows, {answers[0][0].tokens_per_second:.1f} tokens/s")
            begins += len(batch)
        if early:
            say(f"warning: {EARLY}")
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
    budget = "" if record["budget"] is None else f", budget {record['budget_tokens']}"
    if record["budget"] is not None and str(record["budget"]) != str(record["budget_tokens"]):
        budget += f" = {record['budget']}"
    now, peak, full = (readable_bytes(record[f"kv_bytes_{name}"]) for name in ("end", "peak", "full"))
    share = record["kv_bytes_peak"] / max(record["kv_bytes_full"], 1)
    lines = [
        f"{record['method']} on {record['model']} ({device}): {record['tokens_generated']} new tokens, "
        f"{record['tokens_per_second']:.1f} tokens/s, {record['prompt_tokens']} prompt tokens in "
        f"{record['prompt_seconds']:.2f} s" + ("" if record["finished"] else "; cut at --max-new-tokens"),
        f"kept per head: {kept['mean']:g}{spread} of {read} tokens{budget}",
        f"keys and values: now {now}, peak {peak}, full cache {full} (peak is {share:.0%} of it)",
    ]
    if "runs" in record:
        same = f"the same text for {record['agreement']:.0%}, then recency"
        same = "the same text" if record["agreement"] == 1 else same
        lines.append(f"golden ran twice: a full cache for the labels, then under eviction by them; {same}")
    if "correct" in record:
        lines.append(f"answer: {'right' if record['correct'] else 'wrong'}, expected: {record['expected']}")
    return lines


def viz(
    *,
    prompt: o.PromptOptions,
    file: Path | None = None,
    eviction: o.EvictionOptions,
    model: o.ModelOptions,
    max_new_tokens: int = 0,
    out: Path = Path("viz.html"),
    overwrite: bool = False,
) -> None:
    """Write a page that shows which tokens each layer and head keeps while a text is read: one file, no network.

    Examples:

        learnevict viz --task recall --seed 3 --budget 48

        learnevict viz --task program --method h2o --budget 48 --max-new-tokens 200 --out h2o.html

        learnevict viz --model ./my-model --file story.txt --method snapkv --budget 256
    """
    if [prompt.prompt, file, prompt.task].count(None) != 2:
        raise UsageError(
            "give one of --prompt TEXT, --file PATH and --task FAMILY; try --task recall --seed 3 --budget 48"
        )
    row = {"prompt": read_file(file)} if file is not None else prompt.row()
    check(out, PAGE, overwrite=overwrite)
    if eviction.full:
        raise UsageError("a full cache keeps everything; give --budget 48, and --method or --ckpt to choose who evicts")
    from learnevict.evals.viz import page, record, visible
    from learnevict.infer.generate import read_text

    opened = open_model(model).under(eviction)
    request = make_request(opened, row, chat=prompt.chat)
    sample = request.sample
    if max_new_tokens:
        how = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "seed": prompt.seed}
        ((answer, _),) = opened.answer([request], record=True, **how)
        ids, trace = answer.prompt + answer.tokens[:-1], answer.trace
        assert trace is not None
    else:
        ids = request.ids if sample is None else read_text(opened.tokenizer, sample.text)
        trace = record(opened.model, opened.policy_for(ids), ids, len(request.ids))
    layers, _, heads, length = trace.expiry.shape
    about = (
        f"{opened.method} on {opened.name}: {length} tokens read, budget {eviction.budget}, {trace.evictions} "
        f"evictions in {layers} layers x {heads} heads"
    )
    named = f"{sample.family} {sample.seed}: " if sample is not None else ""
    title = f"{named}what the cache keeps under {opened.method}"
    text = page(trace, visible(opened.tokenizer, ids), title, about)
    write(out, text, PAGE, overwrite=overwrite)
    say(f"wrote {out} ({len(text) // 1024} KiB); open it in a browser")
