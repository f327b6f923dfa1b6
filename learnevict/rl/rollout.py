"""One batch of experience: groups of traces, what they cost, and an advantage for every eviction, as actions in one order.

Traces are sampled over given texts in one forward, or in free generation, where the model answers under sampled eviction and a
verifier marks the answer; then every eviction of a trace gets the same credit. The first action of a row is no action: it names
the rollout and is masked. Where the layers' budget allocation is perturbed, that is the next action. Evictions follow, over
layers, events, heads and their permutation; those that a shorter row or event does not have are masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.errors import DataError
from learnevict.infer.attach import attach
from learnevict.infer.teacher_forcing import replay
from learnevict.ops.distributed import highest
from learnevict.ops.random import hashed, uniform
from learnevict.oracle.collect import full_trace
from learnevict.parts.learned import SlotScorer
from learnevict.rl.config import RefineConfig
from learnevict.rl.distribution import NOTHING, allocation_log_probability, entropy, log_probability
from learnevict.rl.rewards import attention_credit, group_relative, of_evictions, to_go_credit, token_costs
from learnevict.rl.trajectory import SamplingPolicy, TextTrajectory, Trajectory, expired, recorded, sample_trajectory

Verifier = Callable[[dict[str, Any], str], float]
"""From a row of the data and the answer's text to a mark from 0 to 1."""


@dataclass(frozen=True)
class PromptAnswer:
    """Token ids of prompt and answer, and where the answer begins: its tokens are what counts."""

    input_ids: list[int]
    prompt_length: int


@dataclass(frozen=True)
class SampledTraces:
    """A batch of traces.

    Attributes:
        trajectory: the evictions, and what the scorer saw.
        cost: of each row's trace, nats per counted token, float32 [R].
        credit: of every action, not scaled [R, A]; None: one number per row, from which TRL computes advantages.
        action_mask: actions that were sampled [R, A].
        log_probs: when they were sampled [R, A].
    """

    trajectory: Trajectory
    cost: Float[Tensor, "R"]
    credit: Float[Tensor, "R A"] | None
    action_mask: Bool[Tensor, "R A"]
    log_probs: Float[Tensor, "R A"]

    @classmethod
    def make(cls, scorer: SlotScorer, trajectory: Trajectory, cost: Tensor, credit: Tensor | None) -> SampledTraces:
        """Returns the traces with their mask and log-probabilities; credit of actions that were not sampled becomes 0."""
        keys, sampled = trajectory.random_keys, [sets.permutation != NOTHING for sets in trajectory.sets]
        allocation = None if trajectory.allocation is None else torch.ones_like(keys)
        mask = actions(torch.zeros_like(keys), allocation, sampled).bool()
        log_probs, _ = log_probabilities(scorer, trajectory, torch.arange(len(keys)))
        return cls(trajectory, cost, None if credit is None else credit * mask, mask, log_probs)

    @property
    def num_evictions(self) -> int:
        """Returns how many evictions were sampled."""
        return sum(int((sets.permutation != NOTHING).sum()) for sets in self.trajectory.sets)

    def completions(self) -> dict[str, Any]:
        """Returns what TRL asks of a rollout_func, beside the prompts."""
        names = torch.arange(len(self.cost), device=self.cost.device)
        allocation = None if self.trajectory.allocation is None else torch.zeros_like(names)
        slots = [sets.permutation.clamp_min(0) for sets in self.trajectory.sets]
        return {
            "completion_ids": actions(names, allocation, slots).long().tolist(),
            "env_mask": self.action_mask.int().tolist(),
            "logprobs": self.log_probs.tolist(),
            "reward": (-self.cost).tolist(),
            "cost": self.cost.tolist(),
        }


@torch.no_grad()
def sample_group(
    model: PreTrainedModel,
    scorer: SlotScorer,
    texts: Sequence[PromptAnswer],
    config: RefineConfig,
    *,
    group: int,
    seeds: tuple[int, int, int],
    device: torch.device,
) -> SampledTraces:
    """Samples a trace per text, all in one forward, and assigns credit for what it cost.

    Args:
        model: the base.
        scorer: whose scores are sampled from.
        texts: each `group` times in a row.
        config: settings.
        group: traces of one text.
        seeds: see `sampling_policy`.
        device: of the base.
    """
    ids, mask, loss_mask = padded(texts, device)
    policy = sampling_policy(model, scorer, config, ids, length=ids.shape[1], seeds=seeds, share=config.layer_share)
    trajectory = sample_trajectory(model, policy, ids, mask)
    once = slice(None, None, group)
    full = replay(model, ids[once], full_trace(model, ids[once]), mask[once]).logits.repeat_interleave(group, 0)
    costs = token_costs(config.cost, trajectory.logits, full, ids, loss_mask, config.ceiling)
    cost = costs.sum(-1) / loss_mask.sum(-1).clamp_min(1)
    credit = assign_credit(model, trajectory, ids[once], mask[once], group_relative(costs, group))
    return SampledTraces.make(scorer, trajectory, cost, credit)


def assign_credit(
    model: PreTrainedModel, trajectory: TextTrajectory, ids: Tensor, mask: Tensor, costs: Tensor
) -> Tensor | None:
    """Returns the credit of every action [R, A] from relative costs [R, T] and each text once; None for credit "trace"."""
    kind = trajectory.config.credit
    if kind == "trace":
        return None
    if kind == "attention":
        by_token = attention_credit(model, ids, mask, costs, expired(trajectory.trace))
        credit = [of_evictions(by_token, sets) for sets in trajectory.sets]
    else:
        credit = [to_go_credit(costs, sets) for sets in trajectory.sets]
    allocation = None if trajectory.allocation is None else -costs.sum(-1)
    return actions(torch.zeros_like(trajectory.random_keys), allocation, credit)


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    scorer: SlotScorer,
    texts: Sequence[PromptAnswer],
    config: RefineConfig,
    *,
    mark: Callable[[int, list[int]], float],
    seeds: tuple[int, int, int],
    device: torch.device,
) -> SampledTraces:
    """Generates an answer to every prompt greedily, each under a trace of its own; its cost is 1 less the mark.

    Args:
        model, scorer, config, seeds, device: as in `sample_group`.
        texts: prompts with reference answers, which bound how long an answer may get; each as often as its group is large.
        mark: from the number of a row and the tokens of its answer to a mark from 0 to 1.
    """
    prompts = [PromptAnswer([*text.input_ids[: text.prompt_length], 0], text.prompt_length) for text in texts]
    ids, mask, _ = (part[:, :-1] for part in padded(prompts, device))
    limit = 2 * highest(max(len(text.input_ids) - text.prompt_length for text in texts), device)
    longest = max(len(text.input_ids) for text in texts)
    policy = sampling_policy(model, scorer, config, ids, length=longest, columns=ids.shape[1] + limit, seeds=seeds)
    generator: Any = model
    with attach(model, policy, prompt_length=mask.sum(-1).tolist()) as cache:
        generated = generator.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=limit,
            do_sample=False,
            use_cache=True,
            synced_gpus=False,  # the base is whole in every process, also under ZeRO-3
        )
    answers = generated[:, ids.shape[1] :]
    ends = model.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
    lengths = answer_lengths(answers, ends if isinstance(ends, list) else [ends])
    trajectory = recorded(policy, ids.shape[1] + lengths)
    marks = [mark(row, answers[row, : int(length)].tolist()) for row, length in enumerate(lengths)]
    return SampledTraces.make(scorer, trajectory, 1 - torch.tensor(marks, device=device), None)


def answer_lengths(answers: Tensor, ends: list[int]) -> Tensor:
    """Returns the tokens of every answer int64 [B], the end token included; what follows it in a batch is padding."""
    stop = torch.isin(answers, torch.tensor(ends, device=answers.device)).int()
    return torch.where(stop.any(-1), stop.argmax(-1), answers.shape[1] - 1) + 1


def log_probabilities(
    scorer: SlotScorer, trajectory: Trajectory, rows: Int[Tensor, "b"]
) -> tuple[Float[Tensor, "b A"], Float[Tensor, "b A"]]:
    """Returns the log-probability, with gradient, of every action of some rows under the scorer as it is now, and the entropy
    of the choice."""
    temperature, scores = trajectory.config.draw_temperature, dict[int, Tensor]()
    for layer, features in trajectory.features.items():
        picked = features[rows]
        scores[layer] = scorer.score_features(layer, picked.flatten(0, 1)).view(picked.shape[:-1])
    found, spread = list[Tensor](), list[Tensor]()
    for sets in trajectory.sets:
        values, candidates, permutation = sets.scores(scores), sets.candidates[rows], sets.permutation[rows]
        found.append(log_probability(values, candidates, permutation, temperature))
        choice = entropy(values.detach(), candidates, temperature)
        spread.append(choice.unsqueeze(-1).expand(permutation.shape) * (permutation != NOTHING))
    front, allocation, certain = torch.zeros(len(rows), device=trajectory.random_keys.device), None, None
    if trajectory.allocation is not None:
        assert scorer.demand is not None
        logits = scorer.demand.logits(trajectory.budget - trajectory.config.least)
        allocation = allocation_log_probability(trajectory.allocation[rows], logits, trajectory.config.share_spread)
        certain = torch.zeros_like(allocation)
    return actions(front, allocation, found), actions(front, certain, spread)


def actions(names: Tensor, allocation: Tensor | None, evictions: list[Tensor]) -> Tensor:
    """Returns one row of actions each [B, A]: names [B], layer allocations [B], if any, then [B, E, R, K] layer by layer."""
    first = [names] if allocation is None else [names, allocation]
    return torch.cat([*(part.unsqueeze(1) for part in first), *(part.flatten(1) for part in evictions)], dim=1)


def padded(texts: Sequence[PromptAnswer], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ids and mask int64 [B, T], padded on the left, and the answers' tokens, bool [B, T].

    Raises:
        DataError: a text has no answer.
    """
    width = max(len(text.input_ids) for text in texts)
    ids, mask, loss_mask = torch.zeros(3, len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        start = width - len(text.input_ids)
        ids[row, start:], mask[row, start:] = torch.tensor(text.input_ids), 1
        loss_mask[row, start + text.prompt_length :] = 1
    if not bool(loss_mask.any(-1).all()):
        raise DataError("a text has no answer behind its prompt, so nothing could be counted; give prompt_length")
    return ids.to(device), mask.to(device), loss_mask.bool().to(device)


def sampling_policy(
    model: PreTrainedModel,
    scorer: SlotScorer,
    config: RefineConfig,
    ids: Tensor,
    *,
    length: int,
    seeds: tuple[int, int, int],
    columns: int | None = None,
    share: float = 1.0,
) -> SamplingPolicy:
    """Returns the policy of a batch: one budget, and noise of each row's own in a share of the layers.

    Args:
        length: the longest text of this process.
        seeds: of the run, the batch, and how many rows other processes have before this one's: the budget depends on the
            first two, a row's noise also on its number among those of all processes.
        columns: that the text may reach; default those of `ids`.
        share: of layers whose evictions are random in a row.
    """
    budget = sample_budget(config, highest(length, ids.device), seeds[:2])
    keys = hashed(seeds[0], seeds[1], seeds[2] + torch.arange(len(ids), device=ids.device))
    noisy = noisy_layers(model.config.get_text_config(decoder=True).num_hidden_layers, share, keys)
    return SamplingPolicy(config, budget, scorer, noisy, columns or ids.shape[1], keys)


def sample_budget(config: RefineConfig, length: int, seeds: tuple[int, int]) -> int:
    """Samples a budget log-uniformly between the limits, under which something is evicted from the longest text.

    Raises:
        DataError: no budget would evict anything.
    """
    low, high = config.min_budget, config.max_budget
    longest = length - config.period - 2  # an event of the longest text comes before its last prediction
    if longest < low:
        raise DataError(f"nothing is evicted from texts of {length} tokens at a budget of {low}; use longer texts")
    noise = torch.rand((), generator=torch.Generator().manual_seed(seeds[0] * 7_368_787 + seeds[1]))
    return min(round(math.exp(math.log(low) + float(noise) * (math.log(high) - math.log(low)))), longest)


def noisy_layers(layers: int, share: float, random_keys: Int[Tensor, "B"]) -> Bool[Tensor, "L B"]:
    """Returns the layers whose evictions are random in each row: a share of them, at least one."""
    noise = uniform(hashed(random_keys, torch.arange(layers, device=random_keys.device).view(-1, 1)))
    return noise <= noise.kthvalue(max(1, round(share * layers)), dim=0).values
