"""GRPO over evictions, on TRL's GRPOTrainer: its groups, clipping, losses, KL and metrics; our rollouts and log-probabilities.

In TRL's words a prompt is a text that the model reads, a completion is what was evicted: one action per draw, in the order
layer, event, head, draw (or event, draw, where all heads race together); where shares of layers were tried, an action in front
of these. Three things differ from what TRL does with words, and each is covered by tests/rl/test_trainer.py, which
says what to look
at when TRL moves:

    rollout_func                           samples traces in one teacher-forced forward (or in free generation)
    _get_per_token_logps_and_entropies     the exact log-probability of the stored draws under the gate as it is now
    _generate_and_score_completions        advantages per draw [rows, actions] instead of one per row, which TRL's loss accepts

The first id of a completion is the number of its rollout; it is masked and counts for nothing.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from learnevict.data.documents import Collator
from learnevict.errors import LearnevictWarning, TrainedOtherwiseWarning, UsageError
from learnevict.hub import Gates
from learnevict.infer.model.supported import evicting_layers
from learnevict.ops.distributed import highest
from learnevict.parts.learned import SlotScorer
from learnevict.rl.free_generation import Verifier, sample_answers
from learnevict.rl.rollout import PromptAnswer, RefineConfig, log_probabilities, sample_group
from learnevict.rl.trajectory import Trajectory
from learnevict.train.gathered import GatheredGates
from learnevict.train.pushing import PushingTrainer
from learnevict.train.validation import Validation, summarise, validate


class EvictionTrainer(PushingTrainer, GRPOTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """See the module.

    Args:
        gates: of a method whose gate is a SlotScorer; its scope and period become those of `refine`.
        base: the model whose cache is governed; frozen.
        refine: how.
        verifier: marks free answers, from a row of the data and the text; needed for refine.free_every.
        validation: what to judge by at evaluations; None: there are none.
        args: a GRPOConfig; per_device_train_batch_size x steps_per_generation must hold whole groups.
        train_dataset: rows {"prompt": token ids of prompt and answer, "prompt_length": int, ...}.
        processing_class: the base's tokenizer.

    Raises:
        UsageError: gates that are no judge, groups that are split over processes, no verifier, or arguments for words.
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
            raise UsageError(f"{gates.method} has no judge to refine; methods with mode 'replay' have (foresightkv)")
        if refine.free_every and verifier is None:
            raise UsageError("free answers need a verifier that marks them; drop --free_every for data without one")
        self.base = base.eval().requires_grad_(False)
        self.refine, self.verifier, self.validation = refine, verifier, validation
        self.rows: list[dict[str, Any]] = []
        self.batch = (0, 0)
        self.episode: Trajectory | None = None
        self.advantages: Tensor | None = None
        gates.generation_config = base.generation_config  # TRL reads pad and end tokens there
        refuse_unused(kwargs["args"])
        prepare(gates.gate, refine, len(evicting_layers(DynamicCache(config=base.config).layers)))
        judge: Any = gates.gate
        gates.config.settings = judge.settings()
        super().__init__(model=gates, reward_funcs=[language_model_reward], rollout_func=rollout, **kwargs)  # pyright: ignore[reportArgumentType]
        self.whole = GatheredGates(self)
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
    def judge(self) -> SlotScorer:
        """What is refined, with whole weights; all processes ask together."""
        gate: Any = self.whole.now().gate
        return gate

    def next_batch(self) -> int:
        """A number for the next batch of texts: the step's, and another for every further one within the step."""
        step = self.state.global_step
        self.batch = (step, self.batch[1] + 1 if self.batch[0] == step and self.episode is not None else 0)
        return step + (self.batch[1] << 32)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As TRL, with advantages per draw."""
        self.rows = inputs
        output = super()._generate_and_score_completions(inputs)
        if self.advantages is not None:
            output["advantages"] = self.advantages
        return output

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, None]:
        """Of the draws of the rollouts named in the first action, [rows, actions]."""
        rows = input_ids[:, -logits_to_keep]
        found: tuple[Tensor, Tensor] = model(log_probabilities, self.episode, rows)
        log_probs, entropies = (torch.nn.functional.pad(part, (1, 0)) for part in found)
        return log_probs, entropies, None

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """SlotScorer the gates against the oracle, as learnevict.train.validation does.

        Raises:
            UsageError: there is nothing to judge by.
        """
        if self.validation is None:
            raise UsageError("nothing to judge by: give the trainer a validation, or the recipe --eval_documents")
        gates = self.whole.now()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            sums = validate(gates, self.base, self.validation, Collator(0))
        metrics = summarise(sums, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *_: Any, rows: Any = (), **__: Any) -> None:
        """TRL asks for a card at every checkpoint; ours belongs to what is shared."""
        if self.args.push_to_hub:
            super().create_model_card(rows)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Gates only, as config.json + model.safetensors; no pickled arguments."""
        folder = output_dir or self.args.output_dir
        gates: Any = self.accelerator.unwrap_model(self.model)
        if self.args.should_save:
            gates.save_pretrained(folder, state_dict=state_dict)


def refuse_unused(args: GRPOConfig) -> None:
    """Refuse what GRPOConfig has for words and evictions do not.

    Raises:
        UsageError: naming the flag to use.
    """
    unused = {
        "temperature": (1.0, "draws have a temperature of their own: --draw_temperature"),
        "beta": (0.0, "the divergence from the gates at the start is weighed by --kl"),
        "mask_truncated_completions": (False, "an eviction is no word that could be cut off: drop it"),
    }
    for name, (default, instead) in unused.items():
        if getattr(args, name) != default:
            raise UsageError(f"--{name} {getattr(args, name)} does nothing here: {instead}")


def prepare(judge: Any, refine: RefineConfig, num_layers: int) -> None:
    """Make a judge one that is refined under these rules, so that it remembers them.

    Args:
        judge: changed in place.
        refine: the rules.
        num_layers: of the base, that evict.

    Warns:
        TrainedOtherwiseWarning: learned shares of layers are dropped, for scope "model", or were learned for other budgets.
    """
    judge.scope, judge.period = refine.scope, refine.period
    if refine.scope == "model" and judge.demand is not None:
        warnings.warn(
            "these gates have learned how layers share a budget; under scope model all layers compete, and that is dropped",
            TrainedOtherwiseWarning,
            stacklevel=2,
        )
        judge.demand = None
    if refine.share_spread:
        judge.share_layers(num_layers, *refine.span)
    if judge.demand is not None:
        judge.demand.requires_grad_(refine.share_spread > 0)


def rollout(prompts: list[list[int]], trainer: EvictionTrainer) -> dict[str, Any]:
    """TRL's rollout_func: traces of every row and their actions, with `reward` and `cost` for the reward function."""
    refine, batch = trainer.refine, trainer.next_batch()
    texts = [PromptAnswer(prompt, row["prompt_length"]) for prompt, row in zip(prompts, trainer.rows, strict=True)]
    where, judge = trainer.accelerator, trainer.judge
    terms: Any = {"seeds": (trainer.args.seed, batch, where.process_index * len(texts)), "device": where.device}
    sampled = None
    if refine.free_every and trainer.state.global_step % refine.free_every == refine.free_every - 1:
        sampled = sample_answers(trainer.base, judge, texts, refine, mark=partial(mark, trainer), **terms)
        if not highest(sampled.evictions, where.device):
            warnings.warn(
                "all answers of a batch ended before anything was evicted, so its texts are read instead; lower the budgets, "
                "or give longer prompts",
                LearnevictWarning,
                stacklevel=2,
            )
            sampled = None
    if sampled is None:
        sampled = sample_group(trainer.base, judge, texts, refine, group=trainer.group, **terms)
    trainer.episode = sampled.episode
    trainer.advantages = None
    if sampled.credit is not None:
        first = 1 if sampled.episode.tried is None else 2  # of the draws; what comes before has another scale
        parts = [part.split([first, part.shape[1] - first], dim=1) for part in (sampled.credit, sampled.taken)]
        moments = torch.stack([*(part.square().sum() for part in parts[0]), *(part.sum() for part in parts[1])])
        spread = where.reduce(moments, reduction="sum")
        sizes = (spread[:2] / spread[2:].clamp_min(1)).sqrt().clamp_min(1e-6)
        trainer.advantages = torch.cat([part / size for part, size in zip(parts[0], sizes, strict=True)], dim=1)
    return {"prompt_ids": prompts, **sampled.completions()}


def language_model_reward(*, reward: list[float], cost: list[float], log_metric: Any, **_: Any) -> list[float]:
    """Minus what the trace cost, as the rollout has found; TRL's reward function."""
    log_metric("cost", sum(cost) / len(cost))
    return reward


def mark(trainer: EvictionTrainer, row: int, answer: list[int]) -> float:
    """What the verifier says of a row's answer."""
    assert trainer.verifier is not None
    tokenizer: Any = trainer.processing_class
    return trainer.verifier(trainer.rows[row], tokenizer.decode(answer))
