"""The testbed: samples are deterministic, unambiguous and hostile to word lists; the weights do what is recorded."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from learnevict import testbed
from learnevict.errors import UsageError
from learnevict.testbed import FAMILIES, Sample, generate

TRUE = {"fact", "set", "given", "do", "post", "apply", "open", "free", "clear"}
FALSE = {"rumour", "old", "joke", "skip", "void", "drop", "shut", "closed", "blocked"}


def clauses(text: str) -> list[list[str]]:
    return [clause.split() for clause in re.sub(r"<\w+>", ";", text).split(";") if clause.strip()]


def believed(text: str) -> list[list[str]]:
    """What is left of a prompt for an interpreter that knows nothing but the marker words."""
    return [clause[1:] for clause in clauses(text) if clause[0] in TRUE]


def questions(text: str) -> list[str]:
    return [clause for clause in clauses(text) if clause[0] == "ask"][-1][1:]


def run_program(prompt: str) -> tuple[list[str], str]:
    values = {said[0]: int(said[1]) for said in believed(prompt) if len(said) == 2}
    lines = sorted((int(said[0][1:]), said[1:]) for said in believed(prompt) if len(said) == 6)
    steps = []
    for label, (left, sign, right, _, target) in lines:
        a, b = values[left], values[right]
        values[target] = (a + b if sign == "+" else a - b) % 10
        steps.append(f"L{label} {left} {a} {sign} {right} {b} = {target} {values[target]}")
    return steps, " ".join(f"{name} {values[name]}" for name in questions(prompt))


def run_ledger(prompt: str) -> tuple[list[str], str]:
    values = {said[0]: int(said[1]) for said in believed(prompt) if len(said) == 2}
    steps = []
    for label, name, sign, amount in (said for said in believed(prompt) if len(said) == 4):
        before = values[name]
        values[name] += int(amount) if sign == "+" else -int(amount)
        steps.append(f"{label} {name} {before} {sign} {amount} = {name} {values[name]}")
    return steps, " ".join(f"{name} {values[name]}" for name in questions(prompt))


def run_recall(prompt: str) -> tuple[list[str], str]:
    liked = {said[0]: " ".join(said[1:]) for said in believed(prompt)}
    return [], " ".join(f"{name} {liked[name]}" for name in questions(prompt))


def run_procedure(prompt: str) -> tuple[list[str], str]:
    roads = {said[0]: said for said in believed(prompt)}
    steps, last, here = [], [], next(clause[1] for clause in clauses(prompt) if clause[0] == "start")
    while here != "home":
        last = roads[here]
        steps.append(" ".join(last))
        here = last[1]
    return steps, f"{last[0]} {last[-1]}"


SOLVERS = {
    "program": run_program,
    "ledger": run_ledger,
    "recall": run_recall,
    "procedure": run_procedure,
    "dialogue": run_recall,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", [0, 1, 2, 3, 4, "long"])
def test_an_independent_interpreter_derives_every_step_from_the_prompt(family: str, level: Any) -> None:
    remarks: dict[str, list[list[str]]] = {}
    for seed in range(40):
        chosen: dict[str, Any] = {"length": "long"} if level == "long" else {"level": level}
        sample = generate(family, seed, split="train", **chosen)
        steps, answer = SOLVERS[family](sample.prompt)
        assert sample.answer == answer
        said = clauses(sample.response)
        for step, following in zip(steps, [*steps[1:], f"answer {answer}"], strict=False):
            assert " ".join(said.pop(0)) == step
            remark = []
            while " ".join(said[0]) != following:
                remark.append(said.pop(0))
            key = re.sub(r"^L\d+ ", "", step)
            assert remarks.setdefault(key, remark) == remark, "a remark must follow from the step before it"
        assert [" ".join(clause) for clause in said] == [f"answer {answer}"]


def test_dialogue_answers_of_earlier_turns_follow_from_what_was_said_before() -> None:
    for seed in range(40):
        messages = generate("dialogue", seed).messages
        for index, message in enumerate(messages):
            if message["content"].startswith("answer"):
                before = " <user> ".join(earlier["content"] for earlier in messages[:index])
                assert message["content"] == f"answer {run_recall(before)[1]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_deterministic_and_splits_disjoint(family: str) -> None:
    assert generate(family, 5) == generate(family, 5)
    texts = [
        generate(family, seed, split=split).text for split in ("train", "validation", "test") for seed in range(50)
    ]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoys_contradict_true_statements_with_the_same_words(family: str) -> None:
    share, conflicts = [], 0
    for seed in range(50):
        sample = generate(family, seed)
        said = clauses(sample.prompt)
        true = [clause[1:] for clause in said if clause[0] in TRUE]
        decoys = [clause[1:] for clause in said if clause[0] in FALSE]
        conflicts += sum(any(decoy[0] == fact[0] and decoy != fact for fact in true) for decoy in decoys)
        words = {word for clause in true for word in clause}
        needed = sum(len(clause) + 2 for clause in true)
        share.append(1 - needed / len(sample.prompt.split()))
        noise = [word for clause in said if clause[0] not in TRUE | FALSE for word in clause]
        assert words & set(noise), "filler must reuse words that matter"
    assert conflicts / 50 >= 3
    assert 0.45 <= sum(share) / 50 <= 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_template_tokenizer_and_marks_agree_with_the_text(family: str) -> None:
    tokenizer = testbed.build_tokenizer()
    for length in ("normal", "long"):
        sample = generate(family, 2, length=length)
        assert (
            tokenizer.apply_chat_template(sample.messages, add_generation_prompt=True, tokenize=False) == sample.prompt
        )
        ids = tokenizer(sample.text).input_ids
        assert tokenizer.decode(ids) == sample.text
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(sample.answer_mask) == len(sample.weights) == len(sample.text.split())
        words = sample.text.split()
        chosen = [word for word, checked in zip(words, sample.answer_mask, strict=True) if checked]
        assert chosen
        assert all(weight for weight, checked in zip(sample.weights, sample.answer_mask, strict=True) if checked)
        assert set(sample.answer.split()) & set(chosen)
        assert testbed.verify(sample, sample.response)
        assert testbed.verify(sample, sample.text)
        assert not testbed.verify(sample, sample.response.removesuffix(" <end>"))
        assert not testbed.verify(sample, sample.prompt)
    assert tokenizer.padding_side == "left"


def test_lengths_are_what_the_budgets_assume() -> None:
    for family in FAMILIES:
        normal = [len(generate(family, seed).answer_mask) for seed in range(50)]
        long = [len(generate(family, seed, length="long").answer_mask) for seed in range(50)]
        assert 310 <= sum(normal) / 50 <= 390
        assert 1.3 <= sum(long) / sum(normal) <= 1.7


def test_unknown_words_are_named() -> None:
    assert testbed.unknown_words("fact ann quantum stone quantum <unk>") == ["quantum", "<unk>"]


@pytest.mark.parametrize("wrong", [{"family": "poem"}, {"split": "dev"}, {"length": "short"}, {"level": 9}])
def test_samples_that_do_not_exist_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="families are"):
        generate(**{"family": "recall", "seed": 0, **wrong})


def record() -> dict[str, Any]:
    return json.loads((testbed.path() / "record.json").read_text())


def test_the_weights_were_trained_on_these_generators_and_are_small() -> None:
    assert testbed.fingerprint() == record()["fingerprint"]
    assert sum(file.stat().st_size for file in testbed.path().iterdir()) <= 8 * 2**20


def test_the_bundled_tokenizer_is_the_one_in_the_code() -> None:
    _, tokenizer = testbed.load()
    built = testbed.build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    assert tokenizer.padding_side == "left"
    assert tokenizer.eos_token == "<end>"


def answers(model: Any, tokenizer: Any, samples: list[Sample]) -> list[bool]:
    inputs = tokenizer([sample.prompt for sample in samples], return_tensors="pt", padding=True)
    out = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=250, do_sample=False)
    texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :])
    return [testbed.verify(sample, text) for sample, text in zip(samples, texts, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_reach_the_recorded_accuracy(family: str) -> None:
    model, tokenizer = testbed.load()
    samples = [generate(family, seed, split="validation") for seed in range(16)]
    hits: list[bool] = []
    with torch.no_grad():
        for sample in samples[:8]:
            ids = tokenizer(sample.text, return_tensors="pt").input_ids
            guesses = model(ids).logits[0, :-1].argmax(-1)
            hits += (guesses == ids[0, 1:])[torch.tensor(sample.answer_mask[1:])].tolist()
    assert sum(hits) / len(hits) >= record()["accuracy"][family]["step_accuracy"] - 0.04
    # 16 samples: three standard errors of a share of 0.95 are 0.16
    assert sum(answers(model, tokenizer, samples)) / 16 >= record()["exact_match"][family] - 0.17
