"""learnevict viz: which tokens each head keeps over time, as a page for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import learnevict.cli.options as o
from learnevict.cli.opened_model import OpenedModel, open_model
from learnevict.cli.output import say
from learnevict.cli.prompts import Request, make_request
from learnevict.errors import UsageError
from learnevict.files import PAGE, check, write
from learnevict.infer.prompts.text_files import read_file


def run(
    *,
    prompt: o.PromptOptions,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A text file, UTF-8.", rich_help_panel=o.PROMPT)
    ] = None,
    eviction: o.EvictionOptions,
    model: o.ModelOptions,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", "-n", min=0, rich_help_panel=o.MACHINE,
            help="Let the model answer under the policy; 0 shows the text as it is (a task with its reference answer).",
        ),
    ] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.", rich_help_panel=o.OUTPUT)] = Path(
        "viz.html"
    ),
    overwrite: o.Overwrite = False,
) -> None:  # fmt: skip
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
    opened = open_model(model)
    request = make_request(opened, row, chat=prompt.chat)
    page = make_page(opened.under(eviction), request, prompt.seed, max_new_tokens)
    write(out, page, PAGE, overwrite=overwrite)
    say(f"wrote {out} ({len(page) // 1024} KiB); open it in a browser")


def make_page(opened: OpenedModel, request: Request, seed: int, max_new_tokens: int) -> str:
    """Returns a page that shows what was kept of the text, or of what the model answers to it."""
    import torch

    from learnevict.evals.viz import page, record, visible
    from learnevict.infer.generate import read_text

    if opened.method == "full":
        raise UsageError("a full cache keeps everything; give --budget 48, and --method or --ckpt to choose who evicts")
    if max_new_tokens:
        (answer,) = opened.answer([request], seed=seed, max_new_tokens=max_new_tokens, temperature=0.0, record=True)
        ids, trace = answer.completion.prompt + answer.completion.tokens[:-1], answer.completion.trace
    else:
        ids = request.ids if request.sample is None else read_text(opened.tokenizer, request.sample.text)
        rows = torch.tensor([ids])
        policy = opened.policy or opened.golden_policy(rows, torch.ones_like(rows), [len(request.ids)])
        trace = record(opened.model, policy, ids, len(request.ids))
    layers, _, heads, length = trace.expiry.shape
    about = (
        f"{opened.method} on {opened.name}: {length} tokens read, budget {opened.eviction.budget}, {trace.evictions} "
        f"evictions in {layers} layers x {heads} heads"
    )
    named = f"{request.sample.family} {request.sample.seed}: " if request.sample is not None else ""
    return page(trace, visible(opened.tokenizer, ids), f"{named}what the cache keeps under {opened.method}", about)
