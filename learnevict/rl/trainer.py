"""TRL's GRPOTrainer over evictions: its groups, clipping, losses, KL and metrics; our rollouts and log-probabilities.

In TRL's words a prompt is a text that the model reads, a completion is what was evicted, one action per eviction (see
learnevict.rl.rollout). The first id of a completion is the number of its rollout; it is masked and counts for nothing. A step,
in order, and where it is:

    rollout      `rollout`, TRL's rollout_func: traces sampled in one teacher-forced forward, or in free generation
    reward       `language_model_reward`, TRL's reward function: minus what a trace costs
    advantage    `_generate_and_score_completions`: `scaled` credit per eviction [rows, actions] instead of TRL's one per row
                 (GRPO), unless refine.credit is "trace"
    loss         TRL's, of the exact log-probability of the stored evictions under the gate as it is now,
                 `_get_per_token_logps_and_entropies`

tests/rl/test_trainer.py covers each of them, and says what to look at when TRL moves. With one update per batch the ratio of
these probabilities is 1, and the step is a plain policy gradient: see learnevict.rl.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from learnevict.errors import LearnevictWarning, TrainedOtherwiseWarning, UsageError
from learnevict.hub import Gates
from learnevict.infer.model.supported import evicting_layers
from learnevict.ops.distributed import highest
from learnevict.parts.learned import SlotScorer
from learnevict.rl.config import RefineConfig
from learnevict.rl.rollout import PromptAnswer, SampledTraces, Verifier, log_probabilities, sample_answers, sample_group
from learnevict.rl.trajectory import Trajectory
from learnevict.train.base_trainer import BaseTrainer
from learnevict.train.validation import Validation


class EvictionTrainer(BaseTrainer, GRPOTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Refines a slot scorer by GRPO over its own evictions.

    Args:
        gates: of a method whose gate is a SlotScorer; its scope and period become those of `refine`.
        base: the model whose cache is governed; frozen.
        refine: settings.
        verifier: marks generated answers, from a row of the data and the text; needed for refine.free_every.
        validation: what evaluations measure; None: there are none.
        args: a GRPOConfig; per_device_train_batch_size x steps_per_generation must hold whole groups.
        train_dataset: rows {"prompt": token ids of prompt and answer, "prompt_length": int, ...}.
        processing_class: the base's tokenizer.

    Raises:
        UsageError: gates without a slot scorer, split groups, no verifier, or arguments that do nothing.
    """

    def __init__(
        self,
        gates: Gates,
        *,
        base: PreTrainedModel,
        refine: RefineConfig,
        verifier: Verifier | None = None,
        validation: Validation | None = None,
        **kwargs: Any,
    ) -> None:
        if gates.gate.mode != "replay":
            raise UsageError(
                f"{gates.method} has no slot scorer to refine; methods with mode 'replay' have (foresightkv)"
            )
        if refine.free_every and verifier is None:
            raise UsageError("free answers need a verifier that marks them; drop --free_every for data without one")
        self.refine, self.verifier = refine, verifier
        self.rows: list[dict[str, Any]] = []  # of the batch in hand, as its trajectory and advantages are
        self.batch = (0, 0)
        self.trajectory: Trajectory | None = None
        self.advantages: Tensor | None = None
        gates.generation_config = base.generation_config  # TRL reads pad and end tokens there
        refuse_unused(kwargs["args"])
        prepare(gates.gate, refine, len(evicting_layers(DynamicCache(config=base.config).layers)))
        scorer: Any = gates.gate
        gates.config.settings = scorer.settings()
        super().__init__(
            model=gates, reward_funcs=[language_model_reward], rollout_func=rollout, base=base, validation=validation, **kwargs
        )  # fmt: skip
        options: Any = self.args
        self.group = int(options.num_generations)
        local = options.per_device_train_batch_size * options.steps_per_generation
        if local % self.group:
            raise UsageError(
                f"a process samples {local} traces at a time, which are no whole groups of {self.group}; make "
                "per_device_train_batch_size a multiple of num_generations"
            )
        if refine.kl:
            reference = Gates(gates.config)  # pyright: ignore[reportArgumentType]
            reference.load_state_dict(gates.state_dict())
            self.ref_model = reference.eval().requires_grad_(False).to(self.accelerator.device)
            self.beta = refine.kl

    @property
    def scorer(self) -> SlotScorer:
        """Returns the scorer that is refined, with gathered weights; all processes ask together."""
        gate: Any = self.gathered_gates().gate
        return gate

    def mark(self, row: int, answer: list[int]) -> float:
        """Returns the verifier's mark of a row's answer."""
        assert self.verifier is not None
        tokenizer: Any = self.processing_class
        return self.verifier(self.rows[row], tokenizer.decode(answer))

    def next_batch(self) -> int:
        """Returns a number for the next batch of texts: the step's, and another for every further one within the step."""
        step = self.state.global_step
        self.batch = (step, self.batch[1] + 1 if self.batch[0] == step and self.trajectory is not None else 0)
        return step + (self.batch[1] << 32)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns TRL's batch, with advantages per eviction; logs evictions in place of figures about generated tokens."""
        self.rows = inputs
        output = super()._generate_and_score_completions(inputs)
        model: Any = self.model
        figures = self._metrics["train" if model.training else "eval"]
        for name in [name for name in figures if name.startswith("completions/")]:
            del figures[name]
        taken = (output["completion_mask"] * output["tool_mask"]).sum(1).float().mean()
        gathered: Any = self.accelerator.gather(taken)
        figures["evictions"].append(gathered.mean().item())
        if self.advantages is not None:
            output["advantages"] = self.advantages
        return output

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, None]:
        """Returns log-probabilities and entropies [rows, actions] of the rollouts that the first action names."""
        rows = input_ids[:, -logits_to_keep]
        log_probs, entropies = model(log_probabilities, self.trajectory, rows)
        return log_probs, entropies, None


def rollout(prompts: list[list[int]], trainer: EvictionTrainer) -> dict[str, Any]:
    """Samples a trace of every row, and returns its actions, with `reward` and `cost` for the reward function."""
    refine, batch = trainer.refine, trainer.next_batch()
    texts = [PromptAnswer(prompt, row["prompt_length"]) for prompt, row in zip(prompts, trainer.rows, strict=True)]
    accelerator, scorer = trainer.accelerator, trainer.scorer
    seeds = (trainer.args.seed, batch, accelerator.process_index * len(texts))
    common: Any = {"seeds": seeds, "device": accelerator.device}
    sampled = None
    if refine.free_every and trainer.state.global_step % refine.free_every == refine.free_every - 1:
        sampled = sample_answers(trainer.base, scorer, texts, refine, mark=trainer.mark, **common)
        if not highest(sampled.num_evictions, accelerator.device):
            warnings.warn(
                "all answers of a batch ended before anything was evicted, so its texts are read instead; lower the budgets, "
                "or give longer prompts",
                LearnevictWarning,
                stacklevel=2,
            )
            sampled = None
    if sampled is None:
        sampled = sample_group(trainer.base, scorer, texts, refine, group=trainer.group, **common)
    trainer.trajectory = sampled.trajectory
    trainer.advantages = None if sampled.credit is None else scaled(sampled, accelerator)
    return {"prompt_ids": prompts, **sampled.completions()}


def language_model_reward(*, reward: list[float], cost: list[float], log_metric: Any, **_: Any) -> list[float]:
    """Returns minus what the traces cost, which the rollout has measured."""
    log_metric("cost", sum(cost) / len(cost))
    return reward


def scaled(sampled: SampledTraces, accelerator: Any) -> Tensor:
    """Returns advantages [rows, actions]: credit divided by its root mean square over all processes, that of layer allocations
    and that of evictions apart."""
    assert sampled.credit is not None
    first = 1 if sampled.trajectory.allocation is None else 2
    parts = [part.split([first, part.shape[1] - first], dim=1) for part in (sampled.credit, sampled.action_mask)]
    moments = torch.stack([*(part.square().sum() for part in parts[0]), *(part.sum() for part in parts[1])])
    spread = accelerator.reduce(moments, reduction="sum")
    sizes = (spread[:2] / spread[2:].clamp_min(1)).sqrt().clamp_min(1e-6)
    return torch.cat([part / size for part, size in zip(parts[0], sizes, strict=True)], dim=1)


def refuse_unused(args: GRPOConfig) -> None:
    """Raises a UsageError for what GRPOConfig has for generated tokens and evictions do not have."""
    unused = {
        "temperature": (1.0, "evictions have a temperature of their own: --draw_temperature"),
        "beta": (0.0, "the divergence from the gates at the start is weighed by --kl"),
        "mask_truncated_completions": (False, "an eviction cannot be truncated: drop it"),
    }
    for name, (default, instead) in unused.items():
        if getattr(args, name) != default:
            raise UsageError(f"--{name} {getattr(args, name)} does nothing here: {instead}")


def prepare(scorer: Any, refine: RefineConfig, num_layers: int) -> None:
    """Writes the settings of its refinement into a scorer; `num_layers` of the base evict.

    Warns:
        TrainedOtherwiseWarning: a learned layer allocation is dropped, for scope "model", or was learned for other budgets.
    """
    scorer.scope, scorer.period = refine.scope, refine.period
    if refine.scope == "model" and scorer.demand is not None:
        warnings.warn(
            "these gates have learned how layers share a budget; under scope model all layers compete, and that is dropped",
            TrainedOtherwiseWarning,
            stacklevel=2,
        )
        scorer.demand = None
    if refine.share_spread:
        scorer.share_layers(num_layers, *refine.span)
    if scorer.demand is not None:
        scorer.demand.requires_grad_(refine.share_spread > 0)
