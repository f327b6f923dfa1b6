"""One batch of experience: groups of traces, what they cost, and an advantage for every draw, as actions in one order.

Actions of a row run over layers, events, heads and draws; one that a shorter row or event does not have is masked. Where shares
of layers are tried, they are one action more, in front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.errors import BudgetError, DataError, UsageError
from learnevict.infer.teacher_forcing import replay
from learnevict.ops.distributed import highest
from learnevict.ops.random import hashed, uniform
from learnevict.oracle.collect import full_trace
from learnevict.parts.learned import SlotScorer
from learnevict.policy import Guard
from learnevict.rl.credit import attention_credit, of_draws, relative, to_go_credit
from learnevict.rl.distribution import NOTHING, entropy, log_probability, shift_log_probability
from learnevict.rl.rewards import COSTS, token_costs
from learnevict.rl.sampler import SamplingTerms
from learnevict.rl.trajectory import Trajectory, expired, sample_trajectory
from learnevict.train.run.ranges import check_numbers

CREDITS = ("trace", "to_go", "attention")


@dataclass(frozen=True)
class RefineConfig:
    """How traces are sampled, paid and blamed.

    Attributes:
        credit: who is to blame: attention (every draw, by what the full cache attends to), to_go (every event, by what comes
            after it) or trace (all draws alike, as in the paper).
        cost: low_entropy (added loss up to the ceiling where the full cache is sure), thresholded (the paper's square of it
            above 1.5) or plain (everywhere).
        ceiling: most that a token can cost, in nats.
        min_budget, max_budget: slots per head, drawn anew for every step, log-uniformly.
        period: tokens between events.
        draw_temperature: of the draws; the higher, the more is tried.
        pool: a draw of n takes from the pool * n lowest scores (the paper: 2); 0: from all candidates.
        layer_share: share of layers whose draws are random in a trace, the others evict greedily; 1: all.
        kl: weight of the divergence from the gates at the start.
        sinks: first tokens that stay.
        recent: last tokens that stay.
        scope: layer (every head holds the budget) or model (all heads of all layers compete).
        floor: share of an equal split that every head keeps, for scope model.
        share_spread: how far layers' shares of the budget are varied, in nats; above 0 it is learned how layers share it, for
            scope layer.
        free_every: every so many batches the model writes its own answers, and a verifier marks them; 0: never.
    """

    credit: str = "attention"
    cost: str = "low_entropy"
    ceiling: float = 2.0
    min_budget: int = 24
    max_budget: int = 64
    period: int = 16
    draw_temperature: float = 0.5
    pool: int = 0
    layer_share: float = 1.0
    kl: float = 0.0
    sinks: int = 4
    recent: int = 8
    scope: str = "layer"
    floor: float = 0.2
    share_spread: float = 0.0
    free_every: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, {"sinks": 0, "recent": 0, "floor": 0})
        floor = self.least
        if not floor <= self.min_budget <= self.max_budget:
            raise BudgetError(
                f"budgets from {self.min_budget} to {self.max_budget} must rise and begin at {floor} or more: "
                f"{self.sinks} sinks, {self.recent} recent and a fresh block of {self.period} stay whatever the scores"
            )
        if self.credit not in CREDITS:
            raise UsageError(f"credit {self.credit!r} is unknown; choose {', '.join(CREDITS)}")
        if self.scope not in ("layer", "model"):
            raise UsageError(f"scope {self.scope!r} is unknown; choose layer or model")
        if self.cost not in COSTS:
            raise UsageError(f"cost {self.cost!r} is unknown; choose {', '.join(COSTS)}")
        if not 0 < self.layer_share <= 1:
            raise UsageError(f"layer_share is above 0 and at most 1, not {self.layer_share}")
        if self.floor > 1:
            raise UsageError(f"floor is at most 1, not {self.floor}")
        if self.share_spread and self.scope == "model":
            raise UsageError(f"share_spread is 0 for scope model, where layers compete anyway; not {self.share_spread}")

    @property
    def least(self) -> int:
        """The smallest budget that works."""
        return Guard(self.sinks, self.recent).reserved(self.period) + 1

    @property
    def span(self) -> tuple[int, int]:
        """What the budgets hold beyond the least that works, at least 1."""
        return max(self.min_budget - self.least, 1), max(self.max_budget - self.least, 1)

    def terms(self, budget: int) -> SamplingTerms:
        """Rules of one batch."""
        names = [one.name for one in fields(SamplingTerms) if one.name not in ("budget", "temperature")]
        return SamplingTerms(budget, temperature=self.draw_temperature, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class PromptAnswer:
    """Token ids of prompt and answer, and where the answer begins: its tokens are what counts."""

    input_ids: list[int]
    prompt_length: int


@dataclass(frozen=True)
class SampledTraces:
    """A batch of traces.

    Attributes:
        episode: the draws, and what the judge saw.
        cost: of each row's trace, nats per counted token, float32 [R].
        credit: of every action, not scaled [R, 1 + A]; None: one number per row, which is TRL's business.
        taken: actions that were drawn [R, 1 + A].
        log_probs: when they were drawn [R, 1 + A].
    """

    episode: Trajectory
    cost: Float[Tensor, "R"]
    credit: Float[Tensor, "R A"] | None
    taken: Bool[Tensor, "R A"]
    log_probs: Float[Tensor, "R A"]

    @property
    def evictions(self) -> int:
        """How many were drawn."""
        return sum(int((races.order != NOTHING).sum()) for races in self.episode.races)

    def completions(self) -> dict[str, Any]:
        """What TRL asks of a rollout_func, beside the prompts; the first action names the rollout."""
        tried = self.episode.tried
        none = None if tried is None else torch.zeros_like(tried[:, 0], dtype=torch.long)
        slots = actions(len(self.cost), [races.order.clamp_min(0) for races in self.episode.races], none).long()
        names = torch.arange(len(slots), device=slots.device).unsqueeze(1)
        return {
            "completion_ids": torch.cat([names, slots], 1).tolist(),
            "env_mask": self.taken.int().tolist(),
            "logprobs": self.log_probs.tolist(),
            "reward": (-self.cost).tolist(),
            "cost": self.cost.tolist(),
        }


@torch.no_grad()
def sample_group(
    model: PreTrainedModel,
    judge: SlotScorer,
    texts: Sequence[PromptAnswer],
    config: RefineConfig,
    *,
    group: int,
    seeds: tuple[int, int, int],
    device: torch.device,
) -> SampledTraces:
    """Sample a trace per text, all in one forward, and settle who is to blame for what it cost.

    Args:
        model: the base.
        judge: whose draws.
        texts: each `group` times in a row.
        config: how.
        group: traces of one text.
        seeds: of the run, the batch, and how many rows other processes have before this one's: the budget depends on the
            first two, a row's noise also on its number among those of all processes.
        device: of the base.
    """
    ids, mask, counted = padded(texts, device)
    terms = config.terms(drawn_budget(config, highest(ids.shape[1], device), seeds[:2]))
    words = row_words(len(ids), seeds, device)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    noisy = noisy_layers(layers, config.layer_share, words)
    episode = sample_trajectory(model, judge, ids, mask, terms, noisy=noisy, words=words)
    once = slice(None, None, group)
    full = replay(model, ids[once], full_trace(model, ids[once]), mask[once]).logits.repeat_interleave(group, 0)
    costs = token_costs(config.cost, episode.logits, full, ids, counted, config.ceiling)
    apart = relative(costs, group)
    taken, credit = was_taken(episode), None
    if config.credit != "trace":
        if config.credit == "attention":
            blame, _ = attention_credit(model, ids[once], mask[once], apart, expired(episode.trace))
            parts = [of_draws(blame, races) for races in episode.races]
        else:
            parts = [to_go_credit(apart, races) for races in episode.races]
        credit = named(actions(len(ids), parts, None if episode.tried is None else -apart.sum(-1))) * taken
    cost = costs.sum(-1) / counted.sum(-1).clamp_min(1)
    log_probs = log_probabilities(judge, episode, torch.arange(len(ids)))[0]
    return SampledTraces(episode, cost, credit, taken, named(log_probs))


def log_probabilities(
    judge: SlotScorer, episode: Trajectory, rows: Int[Tensor, "b"]
) -> tuple[Float[Tensor, "b A"], Float[Tensor, "b A"]]:
    """Of every action of some rows under the judge as it is now, and the entropy of the choice; the first with gradient."""
    temperature, scores = episode.terms.temperature, dict[int, Tensor]()
    for layer, features in episode.features.items():
        picked = features[rows]
        scores[layer] = judge.score_features(layer, picked.flatten(0, 1)).view(picked.shape[:-1])
    found, spread = list[Tensor](), list[Tensor]()
    for races in episode.races:
        raced, pool, order = races.scores(scores), races.pool[rows], races.order[rows]
        found.append(log_probability(raced, pool, order, temperature))
        choice = entropy(raced.detach(), pool, temperature)
        spread.append(choice.unsqueeze(-1).expand(order.shape) * (order != NOTHING))
    shares = None
    if episode.tried is not None:
        assert judge.demand is not None
        terms = episode.terms
        shares = shift_log_probability(episode.tried[rows], judge.demand.logits(terms.free), terms.share_spread)
    none = None if shares is None else torch.zeros_like(shares)
    return actions(len(rows), found, shares), actions(len(rows), spread, none)


def was_taken(episode: Trajectory) -> Bool[Tensor, "R A"]:
    """Actions that were drawn at all."""
    shares = None if episode.tried is None else torch.ones_like(episode.tried[:, 0], dtype=torch.bool)
    return named(actions(episode.rows, [races.order != NOTHING for races in episode.races], shares).bool())


def actions(rows: int, of_races: list[Tensor], of_shares: Tensor | None) -> Tensor:
    """One row of actions each [B, A]: shares of layers [B], if any were tried, then [B, E, R, K] layer by layer."""
    parts = [part.flatten(1) for part in of_races] or [torch.zeros(rows, 0)]
    return torch.cat(parts if of_shares is None else [of_shares.unsqueeze(1), *parts], dim=1)


def named(values: Tensor) -> Tensor:
    """With a nought in front, where the number of the rollout stands."""
    return torch.nn.functional.pad(values, (1, 0))


def padded(texts: Sequence[PromptAnswer], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask int64 [B, T], padded on the left, and the answers' tokens, bool [B, T]."""
    width = max(len(text.input_ids) for text in texts)
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    counted = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        start = width - len(text.input_ids)
        ids[row, start:], mask[row, start:] = torch.tensor(text.input_ids), 1
        counted[row, start + text.prompt_length :] = True
    if not bool(counted.any(-1).all()):
        raise DataError("a text has no answer behind its prompt, so nothing could be counted; give prompt_length")
    return ids.to(device), mask.to(device), counted.to(device)


def drawn_budget(config: RefineConfig, length: int, seeds: tuple[int, int]) -> int:
    """A budget between the smallest and the largest, log-uniformly, under which something is evicted from the longest text.

    Raises:
        DataError: no budget would evict anything.
    """
    low, high = config.min_budget, config.max_budget
    longest = length - config.period - 2  # an event of the longest text comes before its last prediction
    if longest < low:
        raise DataError(f"nothing is evicted from texts of {length} tokens at a budget of {low}; use longer texts")
    draw = torch.rand((), generator=torch.Generator().manual_seed(seeds[0] * 7_368_787 + seeds[1]))
    return min(round(math.exp(math.log(low) + float(draw) * (math.log(high) - math.log(low)))), longest)


def row_words(rows: int, seeds: tuple[int, int, int], device: torch.device) -> Int[Tensor, "B"]:
    """What the noise of each row is hashed from; `seeds` as in `sample_group`."""
    return hashed(seeds[0], seeds[1], seeds[2] + torch.arange(rows, device=device))


def noisy_layers(layers: int, share: float, words: Int[Tensor, "B"]) -> Bool[Tensor, "L B"]:
    """Layers whose draws are random in each row: a share of them, at least one."""
    noise = uniform(hashed(words, torch.arange(layers, device=words.device).view(-1, 1)))
    return noise <= noise.kthvalue(max(1, round(share * layers)), dim=0).values
