"""Refinement on TRL's GRPOTrainer: the contract with TRL, the loss by hand, resuming.

TRL moves fast, and three of its methods are overridden or relied on. When `test_trl_is_the_release_that_was_read` fails, read
these in trl/trainer/grpo_trainer.py of the new release, make the tests below pass, and widen the pin in pyproject.toml:

    _generate           calls rollout_func(prompts, trainer); takes prompt_ids, completion_ids, logprobs and env_mask, and
                        hands other lists on to reward functions
    _generate_and_score_completions     returns a dict whose "advantages" are of shape [rows] or [rows, actions]
    _get_per_token_logps_and_entropies  (model, input_ids, attention_mask, logits_to_keep, ...) -> (logps, entropies, aux)
    _compute_loss       calls it with the completion ids last in input_ids, and masks by env_mask
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch

from learnevict import testbed
from learnevict.errors import LearnevictWarning, TrainedOtherwiseWarning, UsageError
from learnevict.hub import Gates
from learnevict.rl.distribution import NOTHING
from tests.closeness import close
from tests.methods.test_foresightkv import tiny
from tests.recipe_runs import ToBeKilled, run_recipe

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:You are using 'rollout_func'"
)

ROOT = Path(__file__).parents[2]
GROUP = 4


def trainer(folder: Path, gates: Gates | None = None, refine: dict | None = None, verifier=None, **options: object):
    from datasets import Dataset
    from trl import GRPOConfig

    from learnevict.rl.config import RefineConfig
    from learnevict.rl.trainer import EvictionTrainer

    base = tiny()
    torch.manual_seed(5)
    if gates is None:
        gates = Gates.make("foresightkv", base, hidden=8, window=8, period=8)
        with torch.no_grad():
            for weights in gates.parameters():
                weights.normal_(std=0.3)
    draws = torch.Generator().manual_seed(2)
    rows = [
        {"prompt": torch.randint(4, 64, (48 + 3 * i,), generator=draws).tolist(), "prompt_length": 20} for i in range(6)
    ]
    given = {
        "output_dir": str(folder), "per_device_train_batch_size": 2 * GROUP, "num_generations": GROUP, "max_steps": 2,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "seed": 3, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    settings = {"min_budget": 22, "max_budget": 30, "period": 8, "sinks": 2, "recent": 4, "draw_temperature": 1.0}
    settings = {**settings, "cost": "plain", **(refine or {})}
    return EvictionTrainer(
        gates,
        base=base,
        refine=RefineConfig(**settings),
        verifier=verifier,
        args=GRPOConfig(**(given | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=testbed.build_tokenizer(),
    )


def batch(made) -> dict:
    """One generation batch, scored."""
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made._prepare_inputs(next(iter(made.get_train_dataloader())))


def test_trl_is_the_release_that_was_read():
    import trl
    from trl.trainer.grpo_trainer import GRPOTrainer

    assert trl.__version__.startswith("1.16."), __doc__
    wanted = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
        "_compute_loss": ["self", "model", "inputs"],
    }
    for name, parameters in wanted.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters)[: len(parameters)] == parameters


@pytest.mark.parametrize(
    "refine",
    [{}, {"credit": "to_go"}, {"scope": "model"}, {"share_spread": 0.3}],
    ids=["attention", "to_go", "model", "shares"],
)
def test_the_loss_and_its_gradient_are_those_of_the_formula(tmp_path, refine):
    """Minus the sum of advantage x log-probability over sampled actions, over their number: on the first pass ratios are 1."""
    made = trainer(tmp_path, refine=refine)
    inputs = batch(made)
    rows = inputs["completion_ids"][:, 0]
    assert sorted(rows.tolist()) == list(range(2 * GROUP)), "rows lost their rollout's number"
    assert inputs["advantages"].shape == inputs["completion_ids"].shape
    made.model.zero_grad()
    loss = made.compute_loss(made.model, inputs)
    loss.backward()
    found = [weights.grad.clone() for weights in made.model.parameters()]
    made.model.zero_grad()

    total, count = torch.zeros(()), 0
    scorer, trajectory = made.scorer, made.trajectory
    advantage = {int(row): inputs["advantages"][index, 1:] for index, row in enumerate(rows)}
    scores = {
        layer: scorer.score_features(layer, features.flatten(0, 1)).view(features.shape[:-1])
        for layer, features in trajectory.features.items()
    }
    place = 0
    if trajectory.allocation is not None:
        logits = scorer.demand.logits(trajectory.budget - trajectory.config.least)
        for row in range(2 * GROUP):
            apart = (trajectory.allocation[row] - logits).square().sum() / (2 * refine["share_spread"] ** 2)
            total, count = total - advantage[row][place] * apart, count + 1
        place += 1
    for sets in trajectory.sets:
        values = sets.scores(scores)
        for event in range(sets.candidates.shape[1]):
            for number in range(sets.candidates.shape[2]):
                for k in range(sets.permutation.shape[3]):
                    for row in range(2 * GROUP):
                        slot = int(sets.permutation[row, event, number, k])
                        if slot == NOTHING:
                            continue
                        before = sets.permutation[row, event, number, :k].tolist()
                        left = [
                            n
                            for n in sets.candidates[row, event, number].nonzero().flatten().tolist()
                            if n not in before
                        ]
                        chance = -values[row, event, number, slot] - torch.logsumexp(
                            -values[row, event, number, left], 0
                        )
                        total = total + advantage[row][place] * chance
                        count += 1
                    place += 1
    (-total / count).backward()
    assert count == int((inputs["completion_mask"] * inputs["tool_mask"]).sum())
    for one, weights in zip(found, made.model.parameters(), strict=True):
        close(one, weights.grad)


def test_rows_of_a_group_read_one_text_and_their_advantages_cancel(tmp_path):
    made = trainer(tmp_path, refine={"credit": "to_go"})
    inputs = batch(made)
    order = inputs["completion_ids"][:, 0].argsort()
    prompts, advantages = inputs["prompt_ids"][order], inputs["advantages"][order]
    taken = (inputs["completion_mask"] * inputs["tool_mask"])[order].bool()
    for group in range(2):
        rows = slice(group * GROUP, (group + 1) * GROUP)
        assert bool((prompts[rows] == prompts[rows][:1]).all())
        everywhere = taken[rows].all(0)
        there = advantages[rows][:, everywhere]
        close(there.sum(0), torch.zeros(there.shape[1]), scale=float(there.abs().max()))
    assert float(advantages[taken].square().mean()) == pytest.approx(1.0, rel=1e-3)


def test_further_updates_of_a_batch_have_other_ratios_and_clip(tmp_path):
    """The first update is at ratio 1; gates that have moved far are clipped, and what is logged are evictions, not tokens."""
    made = trainer(tmp_path, num_iterations=2)
    inputs = batch(made)
    assert inputs["old_per_token_logps"] is not None
    first = made.compute_loss(made.model, inputs)
    figures = made._metrics["train"]
    assert figures["clip_ratio/region_mean"] == [0.0]
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in made.model.parameters():
            weights.add_(0.5 * torch.randn_like(weights))
    second = made.compute_loss(made.model, inputs)
    assert figures["clip_ratio/region_mean"][-1] > 0
    assert float(first.detach()) != float(second.detach())
    second.backward()
    assert all(bool(weights.grad.isfinite().all()) for weights in made.model.parameters() if weights.grad is not None)
    assert not [name for name in figures if name.startswith("completions/")]
    taken = (inputs["completion_mask"] * inputs["tool_mask"]).sum(1).float().mean()
    assert figures["evictions"] == [pytest.approx(float(taken))]


IN_TWO_PARTS = {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "per_device_train_batch_size": GROUP}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refine", "options"),
    [
        ({}, {"num_iterations": 2, "max_steps": 4}),
        ({"credit": "trace", "layer_share": 0.5}, {"loss_type": "grpo"}),
        ({"kl": 0.1, "cost": "thresholded"}, {"loss_type": "cispo"}),
        ({"scope": "model", "pool": 2}, IN_TWO_PARTS),
    ],
    ids=["two passes", "trace", "kl", "model"],
)
def test_every_variant_trains_and_leaves_gates_behind(tmp_path, refine, options):
    made = trainer(tmp_path, refine=refine, **options)
    before = [weights.detach().clone() for weights in made.model.parameters()]
    made.train()
    moved = [float((one - two).detach().abs().max()) for one, two in zip(before, made.model.parameters(), strict=True)]
    assert max(moved) > 0
    lines = [line for line in made.state.log_history if "cost" in line]
    passes = options.get("num_iterations", 1)
    assert len(lines) == options.get("max_steps", 2) // passes, "a further pass sampled anew"
    assert all(line["cost"] >= 0 for line in lines)
    if "kl" in refine:
        assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert lines[-1]["kl"] > 0
    if passes == 2:
        losses = [line["loss"] for line in made.state.log_history if "loss" in line]
        assert losses[0] != losses[1], "ratios to the old log-probabilities stayed at 1"
    made.save_model(str(tmp_path / "gates"))
    assert {path.name for path in (tmp_path / "gates").iterdir()} <= {"config.json", "model.safetensors", "README.md"}
    again = Gates.load(tmp_path / "gates", made.base)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), made.model.parameters(), strict=True))


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_reward_of_generated_answers_is_the_verifiers_mark(tmp_path, scope):
    """All evictions of an answer get its group's advantage, and none behind its end counts."""
    marks = []

    def verifier(row, text):
        marks.append(float(len(marks) % GROUP == 0))
        return marks[-1]

    made = trainer(
        tmp_path, refine={"free_every": 1, "scope": scope, "min_budget": 16, "max_budget": 16}, verifier=verifier
    )
    made.base.generation_config.eos_token_id = 7  # random text of the tiny model comes across it
    inputs = batch(made)
    order = inputs["completion_ids"][:, 0].argsort()
    advantages, taken = inputs["advantages"][order], inputs["tool_mask"][order].bool()
    assert marks == [1.0, 0.0, 0.0, 0.0] * 2
    assert advantages.shape == (2 * GROUP,)
    assert bool(((advantages > 0) == torch.tensor(marks).bool()).all())
    assert bool(taken.any())
    loss = made.compute_loss(made.model, inputs)
    loss.backward()
    assert bool(torch.isfinite(loss.detach()))
    with pytest.raises(UsageError, match="need a verifier"):
        trainer(tmp_path, refine={"free_every": 1})


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_answers_that_end_before_an_event_are_replaced_by_texts_that_are_read(tmp_path, spread):
    made = trainer(tmp_path, refine={"free_every": 1, "share_spread": spread}, verifier=lambda row, text: 1.0)
    made.base.generation_config.eos_token_id = list(range(made.base.config.vocab_size))
    with pytest.warns(LearnevictWarning, match="texts are read instead"):
        inputs = batch(made)
    assert any(bool((sets.permutation != NOTHING).any()) for sets in made.trajectory.sets), "nothing was sampled"
    assert inputs["advantages"].shape == inputs["completion_ids"].shape  # credit of evictions: texts were read
    assert bool(torch.isfinite(made.compute_loss(made.model, inputs).detach()))


def test_batches_of_one_step_have_noise_and_budgets_of_their_own(tmp_path):
    made = trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=GROUP, steps_per_generation=1)
    seen = []
    for texts in list(made.get_train_dataloader())[:2]:
        made.model.train()
        made.current_gradient_accumulation_steps = 2
        made._prepare_inputs(texts)
        made._step += 1
        seen.append(made.batch)
    assert seen == [(0, 0), (0, 1)]


def test_a_refined_scorer_remembers_its_settings(tmp_path):
    made = trainer(tmp_path, refine={"share_spread": 0.3})
    assert made.scorer.settings() == {"hidden": 8, "window": 8, "period": 8, "demand": [2, 11, 19]}
    assert {"period": 8, "demand": [2, 11, 19]}.items() <= made.model.config.settings.items()
    with pytest.warns(TrainedOtherwiseWarning, match="share 11 to 19 slots"):
        trainer(tmp_path, gates=made.model, refine={"share_spread": 0.3, "min_budget": 40, "max_budget": 40})
    with pytest.warns(TrainedOtherwiseWarning, match="that is dropped"):
        together = trainer(tmp_path, gates=made.model, refine={"scope": "model", "period": 4})
    assert together.scorer.settings() == {"hidden": 8, "window": 8, "period": 4, "scope": "model"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.3}, "--draw_temperature"),
        ({"beta": 0.04}, "--kl"),
        ({"mask_truncated_completions": True}, "drop it"),
    ],
)
def test_arguments_that_do_nothing_are_refused(tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        trainer(tmp_path, **options)


def test_what_cannot_be_refined_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no slot scorer to refine"):
        trainer(tmp_path, gates=Gates.make("lexical", tiny()))


FLAGS = (
    "--use_cpu --families program --documents 8 --max_steps 4 --save_steps 1 --per_device_train_batch_size 8 "
    "--num_generations 4 --logging_steps 1 --disable_tqdm true --share_spread 0.3"
)


def refining(folder: Path, *more: str) -> list[str]:
    return [str(ROOT / "recipes" / "grpo.py"), *FLAGS.split(), "--output_dir", str(folder), *more]


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_as_if_nothing_had_been(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_recipe(*refining(whole)).returncode == 0
    ToBeKilled(*refining(killed)).kill_after((killed / "checkpoint-2" / "trainer_state.json").exists)
    assert not (killed / "model.safetensors").exists()
    assert run_recipe(*refining(killed, "--resume_from_checkpoint", "true")).returncode == 0
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    logs = [json.loads((folder / "run.json").read_text())["log"] for folder in (whole, killed)]
    costs = [[line["cost"] for line in log if "cost" in line] for log in logs]
    assert costs[0] == costs[1]
