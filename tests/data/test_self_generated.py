"""Answers of the model in place of given ones: what it says alone, whoever shares the work; and a run that learns from them."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from learnevict import testbed
from learnevict.data.label_store import Document, hash_documents
from learnevict.data.self_generated import SelfGeneration, generate_answers
from learnevict.errors import DataError, LearnevictWarning, UsageError
from learnevict.hub.run_record import read_record

TOKENIZER = testbed.build_tokenizer()
ROOT = Path(__file__).resolve().parents[2]
MOST = 9


def tiny() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def documents(prompts: list[int], answers: list[int]) -> list[Document]:
    rng = Random(0)
    sizes = zip(prompts, answers, strict=True)
    return [
        Document(rng.choices(range(10, 60), k=prompt + given), prompt, "made up", index)
        for index, (prompt, given) in enumerate(sizes)
    ]


def said_alone(model: Any, prompt: list[int], most: int) -> list[int]:
    """Greedily, one forward of the whole text per token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] != TOKENIZER.eos_token_id):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


def eager(model: Any, after: int) -> Any:
    """The same model, which ends its turn where it would have said this token for the first time."""
    with torch.no_grad():
        head = model.lm_head.weight
        head[TOKENIZER.eos_token_id] = head[after] * 1.01
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    return model


def test_answers_are_what_the_model_says_alone():
    model = tiny()
    given = documents([12, 5, 20, 7, 9], [6, 3, MOST, 0, 4])
    word = said_alone(model, given[1].input_ids[:5], 4)[-1]
    model = eager(model, word)
    found = generate_answers(model, TOKENIZER, given, SelfGeneration(batch_size=2))
    for before, after in zip(given, found, strict=True):
        prompt = before.input_ids[: before.prompt_length]
        assert after.input_ids == said_alone(model, prompt, MOST)
        assert (after.prompt_length, after.seed) == (before.prompt_length, before.seed)
    lengths = {len(one.input_ids) - one.prompt_length for one in found}
    assert len(lengths) > 1, "no answer ended early, so nothing shows where one ends"
    assert hash_documents(found) == hash_documents(
        generate_answers(model, TOKENIZER, given, SelfGeneration(batch_size=2))
    )
    short = generate_answers(model, TOKENIZER, given, SelfGeneration(max_tokens=2, max_length=21))
    assert [len(one.input_ids) - one.prompt_length for one in short] == [2, 2, 1, 2, 2]


def test_processes_share_the_prompts(monkeypatch):
    """Each answers its own batches; together they have what one alone would have."""
    model, given = tiny(), documents([12, 5, 20, 7, 9], [6, 3, MOST, 0, 4])
    alone = generate_answers(model, TOKENIZER, given, SelfGeneration(batch_size=2))
    parts: list[list[tuple[int, list[int]]]] = []

    def gather(mine: list[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
        parts.append(mine)
        return [pair for part in parts for pair in part]

    monkeypatch.setattr("learnevict.data.self_generated.gather_object", gather)
    with pytest.raises(KeyError):  # what the second process has not answered yet
        generate_answers(model, TOKENIZER, given, SelfGeneration(batch_size=2, rank=0, num_ranks=2))
    assert generate_answers(model, TOKENIZER, given, SelfGeneration(batch_size=2, rank=1, num_ranks=2)) == alone
    assert [len(part) for part in parts] == [3, 2]


def test_what_cannot_be_answered_is_told():
    model, given = tiny(), documents([0, 5, 20], [9, 3, 2])
    with pytest.warns(LearnevictWarning, match="2 of 3 texts have no prompt to answer"):
        assert len(generate_answers(model, TOKENIZER, given, SelfGeneration(max_length=20))) == 1
    with pytest.raises(DataError, match="no document has a prompt"):
        generate_answers(model, TOKENIZER, given[:1], SelfGeneration())
    assert SelfGeneration().longest(given) == 3, "a text without a prompt is no answer"
    with pytest.raises(UsageError, match="give --answer_tokens"):
        generate_answers(model, TOKENIZER, documents([5, 6], [0, 0]), SelfGeneration())
    with pytest.raises(UsageError, match="0 tokens or more"):
        SelfGeneration(max_tokens=-1)


@pytest.fixture(scope="module")
def distill() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("recipes.distill")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Of a short run over prompts alone."""
    tiny().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    words = [word for word in TOKENIZER.get_vocab() if not word.startswith("<")]
    rng = Random(0)
    rows = [{"prompt": " ".join(rng.choices(words, k=20 + i))} for i in range(9)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        *("--model", str(tmp_path / "base"), "--data", str(tmp_path / "prompts.jsonl"), "--method", "judge_q"),
        *("--num_tokens", "3", "--horizon", "4", "--period", "4", "--per_device_train_batch_size", "2"),
        *("--max_steps", "4", "--save_steps", "2", "--warmup_steps", "1", "--disable_tqdm", "true", "--cuts", "1"),
    ]


@pytest.mark.slow
def test_a_run_learns_from_the_models_own_answers_and_resumes_exactly(tmp_path, distill, flags):
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    more = ["--own_answers", "true", "--answer_tokens", "8"]
    distill.main(distill.parse([*flags, *more, "--output_dir", str(whole)]))
    shutil.copytree(whole / "checkpoint-2", lost / "checkpoint-2")
    shutil.copy(whole / "run.json", lost)
    again = [*flags, "--output_dir", str(lost), "--resume_from_checkpoint", "true"]
    with pytest.raises(UsageError, match="had another data_hash"):
        distill.main(distill.parse([*again, "--own_answers", "true", "--answer_tokens", "7"]))
    distill.main(distill.parse([*again, *more]))
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, lost))
    assert all(torch.equal(part, other[name]) for name, part in one.items())
    record = read_record(lost)
    assert record["config"]["own_answers"] is True
    assert record["data_hash"] == read_record(whole)["data_hash"]


def test_flags_that_contradict_own_answers(distill, flags, tmp_path):
    with pytest.raises(DataError, match="no document has a prompt and a response"):
        distill.main(distill.parse([*flags, "--output_dir", str(tmp_path / "out")]))
    for more in (["--streaming"], ["--packed"], ["--labels", "folder"]):
        with pytest.raises(UsageError, match="drop --streaming and --packed, and --labels"):
            distill.main(distill.parse([*flags, "--own_answers", "true", *more]))
