"""Experience in free generation: the model lives with its own words under sampled eviction, and a verifier marks the answer.

What is paid for is the answer and nothing on the way, so every draw of a trace gets the same credit; it is rare and noisy, and
what it adds to the language model's loss is that nothing but the task counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.infer.attach import attach
from learnevict.ops.distributed import highest
from learnevict.parts.learned import SlotScorer
from learnevict.rl.rollout import (
    PromptAnswer,
    RefineConfig,
    SampledTraces,
    drawn_budget,
    log_probabilities,
    named,
    padded,
    row_words,
    was_taken,
)
from learnevict.rl.sampler import SamplingPolicy
from learnevict.rl.trajectory import Trajectory, gathered

Verifier = Callable[[dict[str, Any], str], float]
"""From a row of the data and the answer's text to a mark from 0 to 1."""


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    judge: SlotScorer,
    texts: Sequence[PromptAnswer],
    config: RefineConfig,
    *,
    mark: Callable[[int, list[int]], float],
    seeds: tuple[int, int, int],
    device: torch.device,
) -> SampledTraces:
    """Let the model answer every prompt greedily, each under a trace of its own.

    Args:
        model: the base.
        judge: whose draws.
        texts: prompts with reference answers, which bound how long an answer may get; each as often as its group is large.
        config: how.
        mark: from the number of a row and the tokens of its answer to a mark from 0 to 1.
        seeds: as in `sample_group`.
        device: of the base.
    """
    prompts = [PromptAnswer([*text.input_ids[: text.prompt_length], 0], text.prompt_length) for text in texts]
    ids, mask, _ = (part[:, :-1] for part in padded(prompts, device))
    limit = 2 * highest(max(len(text.input_ids) - text.prompt_length for text in texts), device)
    length = highest(max(len(text.input_ids) for text in texts), device)
    terms = config.terms(drawn_budget(config, length, seeds[:2]))
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    everywhere = torch.ones(layers, len(ids), dtype=torch.bool, device=device)
    explorer = SamplingPolicy(terms, judge, everywhere, ids.shape[1] + limit, row_words(len(ids), seeds, device))
    generator: Any = model
    with attach(model, explorer, prompt_length=mask.sum(-1).tolist()) as cache:
        written = generator.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=limit,
            do_sample=False,
            use_cache=True,
            synced_gpus=False,  # the base is whole in every process, also under ZeRO-3
        )
    ends = model.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
    lengths = answer_lengths(written[:, ids.shape[1] :], ends if isinstance(ends, list) else [ends])
    episode = Trajectory(*gathered(explorer))
    episode = replace(episode, races=[one.until(ids.shape[1] + lengths) for one in episode.races])
    marks = [mark(row, written[row, ids.shape[1] :][: int(length)].tolist()) for row, length in enumerate(lengths)]
    log_probs = log_probabilities(judge, episode, torch.arange(len(ids)))[0]
    return SampledTraces(episode, 1 - torch.tensor(marks, device=device), None, was_taken(episode), named(log_probs))


def answer_lengths(answers: Tensor, ends: list[int]) -> Tensor:
    """Tokens of every answer int64 [B], the end token included; what follows it in a batch is padding."""
    stop = torch.isin(answers, torch.tensor(ends, device=answers.device)).int()
    first = torch.where(stop.any(-1), stop.argmax(-1), answers.shape[1] - 1)
    return first + 1
