"""learnevict viz: which tokens each head keeps over time, as a page for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import learnevict.cli.options as o
from learnevict.cli.generation import Generator, golden_policy
from learnevict.cli.output import say
from learnevict.cli.policy_choice import OpenedModel, PolicyChoice, open_model
from learnevict.cli.prompts import Request, check_chat, make_request, read_prompt
from learnevict.errors import UsageError
from learnevict.files import PAGE, check
from learnevict.files import write as write_file
from learnevict.infer.prompts.text_files import read_file


def run(
    prompt: o.Prompt = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A text file, UTF-8.", rich_help_panel=o.PROMPT)
    ] = None,
    task: o.Task = None,
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
    write: Annotated[
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
    given = [value for value in (prompt, file, task) if value is not None]
    if len(given) != 1:
        raise UsageError(
            "give one of --prompt TEXT, --file PATH and --task FAMILY; try --task recall --seed 3 --budget 48"
        )
    check_chat(chat=chat, task=task)
    choice = PolicyChoice(
        method, ckpt, budget, allow_other_base, sinks, recent, slack, None if schedule is None else schedule.value,
        keep_prompt or None, variant,
    )  # fmt: skip
    text = read_file(file) if file is not None else read_prompt(prompt or "")
    check(out, PAGE, overwrite=overwrite)
    opened = open_model(model, device, dtype.value, allow_pickle=allow_pickle)
    content = {"task": task, "seed": seed} if task is not None else {"prompt": text}
    request = make_request(opened, content, chat=chat)
    page = make_page(opened, choice, request, seed, write)
    write_file(out, page, PAGE, overwrite=overwrite)
    say(f"wrote {out} ({len(page) // 1024} KiB); open it in a browser")


def make_page(opened: OpenedModel, choice: PolicyChoice, request: Request, seed: int, write: int) -> str:
    """Run the text, or let the model write, and lay out what was kept."""
    from learnevict.evals.viz import page, record, visible

    sampling = {"max_new_tokens": max(write, 1), "temperature": 0.0}
    answering = Generator(opened, choice, sampling, record=write > 0)
    if answering.policy is None and not answering.golden:
        raise UsageError("a full cache keeps everything; give --budget 48, and --method or --ckpt to choose who evicts")
    if write:
        (answer,) = answering([request], seed=seed)
        ids, trace = answer.completion.prompt + answer.completion.tokens[:-1], answer.completion.trace
    else:
        ids = whole_text(opened, request)
        policy = answering.policy or read_golden(opened, choice, ids, len(request.ids))
        trace = record(opened.model, policy, ids, len(request.ids))
    layers, _, heads, length = trace.expiry.shape
    about = (
        f"{answering.method} on {opened.name}: {length} tokens read, budget {choice.budget}, {trace.evictions} "
        f"evictions in {layers} layers x {heads} heads"
    )
    named = f"{request.sample.family} {request.sample.seed}: " if request.sample is not None else ""
    return page(trace, visible(opened.tokenizer, ids), f"{named}what the cache keeps under {answering.method}", about)


def whole_text(opened: OpenedModel, request: Request) -> list[int]:
    """A task with its reference answer; any other text as it is."""
    from learnevict.infer.generate import read_text

    return request.ids if request.sample is None else read_text(opened.tokenizer, request.sample.text)


def read_golden(opened: OpenedModel, choice: PolicyChoice, ids: list[int], prompt: int) -> Any:
    """Golden for a text that is known to its end."""
    import torch

    rows = torch.tensor([ids])
    return golden_policy(opened, choice, rows, torch.ones_like(rows), [prompt])
