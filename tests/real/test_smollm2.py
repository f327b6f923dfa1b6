"""SmolLM2-135M: what it took to get it, and that everything which works on the testbed works on a pretrained model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from transformers import PreTrainedModel

from learnevict import Gates, attach, methods
from learnevict.cli import main
from learnevict.hub.models import fetch
from learnevict.infer.model.catalogue import MODELS, folder_of_known
from tests.laws.cases import EXEMPT, Case
from tests.laws.test_laws import LAWS
from tests.recipe_runs import run_recipe

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("default")]
TRAINING_FREE = [
    name for name in methods.METHODS if methods.load(name).PAPER.kind != "learned" and name not in ("full", "golden")
]
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Standard output of a command line that succeeds."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    found = capsys.readouterr()
    assert code == 0, found.err
    return found.out


def test_the_conversion_equals_another_reading_of_the_file(tmp_path):
    """Every tensor, through the reader of llama.cpp's own library; rows of queries and keys are put back in order here."""
    weights = load_file(folder_of_known("smollm2") / "model.safetensors")
    left = set(weights)
    for tensor in GGUFReader(fetch(MODELS["smollm2"], tmp_path)).tensors:
        layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        key = ("" if layer is None else f"model.layers.{layer}.") + NAMES[name] + ".weight"
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name in ("attn_q", "attn_k"):  # 64 rows a head: 0, 32, 1, 33, ...
            expected = expected.view(-1, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
        assert torch.equal(weights[key], expected), key
        left.remove(key)
    assert not left


def test_it_speaks_as_it_was_taught(smollm2, prose):
    model, tokenizer = smollm2
    assert tokenizer.convert_ids_to_tokens(tokenizer("in  1984")["input_ids"]) == ["in", "ĠĠ", "1", "9", "8", "4"]
    assert answer(model, tokenizer, "What is the capital of France?") == "The capital of France is Paris."
    filler = prose[:2400]
    needle = f"{filler[:1200]}\nThe secret code is 7305.\n{filler[1200:]}\n\nWhat is the secret code?"
    assert "7305" in answer(model, tokenizer, needle)


def answer(model: Any, tokenizer: Any, question: str, policy: Any = None) -> str:
    """The greedy answer in a chat, with the stock cache or under a policy."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    if policy is None:
        found = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    else:
        with attach(model, policy) as cache:
            found = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_a_full_cache_of_ours_is_the_stock_cache(smollm2, prose):
    question = f"{prose[:1500]}\n\nSay in one sentence what this is about."
    expected = answer(*smollm2, question)
    assert len(expected) > 20
    assert answer(*smollm2, question, methods.full.policy(512)) == expected
    assert answer(*smollm2, question, methods.snapkv.policy(4096)) == expected


@dataclass(frozen=True)
class RealCase(Case):
    """A case of the laws on the real model: three rows, two padded, 49 tokens, at most 20 + 4 slots."""

    given: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.given


@pytest.mark.parametrize("method", TRAINING_FREE)
def test_laws_hold_for_every_training_free_method(eager, law_matrix, method):
    case = RealCase(method, "smollm2", given=eager)
    for law in ("bounded", "masking", "gone"):
        if (method, law) not in EXEMPT:
            evictions = LAWS[law](case)
            assert evictions > 0
            law_matrix.record(law, method, "smollm2", evictions)


def test_infer_by_name(capsys):
    words = ("--chat", "--prompt", "Write three sentences about the sea.", "-n", 48, "--json")
    row = json.loads(
        run(capsys, "infer", "--model", "smollm2", *words, "--method", "snapkv", "--budget", 48, "--slack", 8)
    )
    assert row["model"] == "smollm2"
    assert row["kept"]["max"] <= 48 + 8 < row["prompt_tokens"] + row["tokens_generated"]
    assert row["kv_bytes_peak"] < row["kv_bytes_full"]


def test_perplexity_under_a_budget_is_what_a_real_model_gives(capsys, prose, tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text(prose)
    words = ("--task", "perplexity", "--text", text, "--max-tokens", 768, "--json")
    methods = ("--methods", "full,h2o,random", "--budgets", "192", "--slack", "32")
    out = run(capsys, "eval", "--model", "smollm2", *words, *methods)
    found = {row["method"]: row["perplexity"] for row in map(json.loads, out.splitlines())}
    assert 3 < found["full"] < 30
    assert found["full"] < found["h2o"] < 1.15 * found["full"]
    assert found["h2o"] < found["random"] < 1.6 * found["full"]


def test_labels_and_training_and_what_it_would_take(texts, tmp_path):
    common = ("--model", "smollm2", "--data", str(texts), "--max_length", "192")
    words = ("recipes/oracle.py", *common, "--documents", "4", "--batch_size", "2", "--block", "32")
    labels = run_recipe(*words, "--out", str(tmp_path / "l"))
    assert labels.returncode == 0, labels.stderr
    assert list((tmp_path / "l" / "data").glob("*.parquet"))
    words = (
        "recipes/distill.py", "--method", "kvzap", *common, "--documents", "4", "--eval_documents", "2", "--max_steps", "2",
        "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "gate"),
    )  # fmt: skip
    planned = run_recipe(*words, "--dry_run")
    assert planned.returncode == 0, planned.stderr
    assert "GiB" in planned.stdout + planned.stderr
    assert not (tmp_path / "gate").exists()
    trained = run_recipe(*words)
    assert trained.returncode == 0, trained.stderr
    gates = Gates.load(tmp_path / "gate")
    assert gates.method == "kvzap"
    assert all(bool(weights.isfinite().all()) for weights in gates.parameters())


def test_the_gates_that_ship_keep_a_needle_that_is_asked_for_later(capsys, prose, tmp_path):
    """Four contexts, another source than that of docs/real-models.md; with equal shares no ranking keeps them."""
    (tmp_path / "prose.txt").write_text(prose)
    words = (
        "eval", "--model", "smollm2", "--tasks", "needle", "--question", "after", "--text", tmp_path / "prose.txt",
        "--length", 500, "--samples", 4, "--slack", 16, "--budgets", "1/6", "--json",
    )  # fmt: skip
    shares = ("--allocation", "docs/results/real/profile.json")
    gate = run(capsys, *words, "--methods", "kvzap", "--ckpt", "smollm2-kvzap", *shares)
    plain = run(capsys, *words, "--methods", "snapkv", "--allocation", "equal")
    kept, lost = (json.loads(out.splitlines()[-1])["exact_after"] for out in (gate, plain))
    assert kept >= 0.75 and lost <= 0.5


def test_the_reasoner_works_bookkeeping_out_step_by_step(capsys):
    """Cases that its adapter has not seen; almost all answers are right with the full cache (docs/real-models.md)."""
    run(capsys, "model", "get", "smollm2-reasoning")
    words = (
        "eval",
        "--model",
        "smollm2-reasoning",
        "--tasks",
        "accounts,moves",
        "--samples",
        4,
        "--batch-size",
        4,
        "--json",
    )
    rows = [json.loads(line) for line in run(capsys, *words, "--methods", "full").splitlines()]
    assert {row["family"] for row in rows} == {"accounts", "moves"}
    assert all(row["step_accuracy"] > 0.98 for row in rows)
    assert sum(row["exact_match"] for row in rows) / len(rows) >= 0.75
