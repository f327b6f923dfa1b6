"""Draws the two pictures at the top of README.md: how long each head keeps each token of one text, and accuracy against budget.

    python -m tools.picture                                        # writes docs/kept.png and docs/accuracy.png
    python -m tools.picture --docs /tmp/pictures --budget 64 --seed 5

The testbed's model answers a question of the family "recall" twice, with the same number of slots: under streaming_llm, and
under the gates that ship with the package. Both traces are recorded while it generates.
Accuracies are those of the family "program" in docs/results/main.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from learnevict import Gates, methods, testbed
from learnevict.evals.plots import INK, plot, save_figure
from learnevict.evals.records import read_rows
from learnevict.infer.generate import Completion, generate

ROOT = Path(__file__).resolve().parent.parent
ASKED, ANSWER, OTHER = "#0b6bcb", "#0f766e", "#94a3b8"
"""Colours of the statements that the question asks for, of the question and its answer, and of everything else."""


def clauses(words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yields where each clause of a text begins and ends: the tokens up to and with the next semicolon."""
    start = 0
    for index, word in enumerate(words):
        if word == ";" or index + 1 == len(words):
            yield start, index + 1
            start = index + 1


def colour(clause: Sequence[str], inside_prompt: bool, answer: str) -> str:
    """Returns the colour of a clause: a statement is asked for if the answer repeats it without its first word."""
    if not inside_prompt or "ask" in clause:
        return ANSWER
    statement = " ".join(word for word in clause if word not in ("<bos>", "<user>", ";")).split(" ", 1)[-1]
    return ASKED if f" {statement} " in f" {answer} " else OTHER


def panel(axis: Any, done: Completion, words: list[str], answer: str) -> None:
    """Draws one bar for every token and head, from the step that reads the token to the step that no longer sees it."""
    assert done.trace is not None
    expiry = done.trace.expiry[:, 0].flatten(0, 1)  # [layers x heads, tokens]
    heads, length = expiry.shape
    for start, stop in clauses(words[:length]):
        begins = torch.arange(start, stop).repeat_interleave(heads)
        height = begins + torch.arange(heads).repeat(stop - start) / heads
        ends = expiry[:, start:stop].T.flatten().clamp_max(length)
        shade = colour(words[start:stop], start < len(done.prompt) - 2, answer)
        axis.barh(
            height, ends - begins, left=begins, height=1 / heads, align="edge", color=shade, linewidth=0, snap=False
        )
    axis.axvline(len(done.prompt), color=INK, linewidth=0.8, linestyle=":")
    axis.set(xlim=(0, length), ylim=(length, 0), xlabel="tokens read so far (dotted: the prompt ends)")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def draw(
    out: Path, *, family: str = "recall", level: int = 3, seed: int = 3, budget: int = 48, slack: int = 16
) -> Path:
    """Generates under both policies and writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    model, tokenizer = testbed.load()
    sample = testbed.generate(family, seed, level=level)
    ids = tokenizer(sample.prompt, add_special_tokens=False).input_ids
    gates = Gates.load("testbed-foresightkv")
    policies = {
        "streaming_llm": methods.streaming_llm.policy(budget, slack=slack),
        "foresightkv, a learned gate": gates.policy(budget, slack=slack),
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 8), sharey=True)
    for axis, (name, policy) in zip(axes, policies.items(), strict=True):
        (done,) = generate(model, tokenizer, policy, [ids], record=True, max_new_tokens=40)
        words = [tokenizer.decode([token]) for token in done.prompt + done.tokens]
        panel(axis, done, words, sample.answer)
        wanted, given = sample.answer.split(), done.text.removeprefix("answer ").split()
        right = sum(one == other for one, other in zip(wanted, given, strict=False))
        axis.set_title(f"{name}: {right} of {len(wanted)} words right", loc="left", color=INK, fontweight="bold")
    words = [tokenizer.decode([token]) for token in ids]
    spans = list(clauses(words[:-2]))
    axes[0].set_yticks([(a + b) / 2 for a, b in spans], [" ".join(words[a:b]) for a, b in spans], fontsize=7)
    for label, (start, stop) in zip(axes[0].get_yticklabels(), spans, strict=True):
        shade = colour(words[start:stop], True, sample.answer)
        label.set_color(INK if shade == OTHER else shade)
    lines = (
        "Each thin line is a token in one of eight heads, from the step that reads it to its eviction.",
        f"Both policies have {budget} slots per head, and {slack} more between events. "
        "Blue: what the question asks for. Green: question and answer.",
    )
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, color=INK)
    figure.tight_layout()
    save_figure(figure, out, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    for option, number in (("level", 3), ("seed", 3), ("budget", 48), ("slack", 16)):
        parser.add_argument(f"--{option}", type=int, default=number)
    given = vars(parser.parse_args())
    folder = given.pop("docs")
    draw(folder / "kept.png", **given)
    plot(read_rows(ROOT / "docs" / "results" / "main" / "program.jsonl"), folder / "accuracy.png")
