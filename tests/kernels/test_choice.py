"""Who decodes: kernels change no token, say which layers they leave to torch, and are refused where none can run."""

from __future__ import annotations

import json
import threading
import warnings

import pytest
import torch

from learnevict import EvictingCache, attach, methods
from learnevict.cli import main
from learnevict.errors import KernelUnusedWarning, ModelError, UsageError
from learnevict.infer import attention
from learnevict.ops import kernels as ops
from learnevict.ops import slot_attention, unfit, using_kernels
from tests.laws.zoo import build, tokens

STEPS = 3
SERVED = {("llama", "streaming_llm"), ("llama", "snapkv"), ("qwen3", "keydiff"), ("gemma3", "snapkv")}
TORCH = {
    ("llama", "h2o"): "2 of 2 evicting layers .* watches every step",
    ("qwen3", "adakv"): "2 of 2 evicting layers .* ragged",
    ("gpt_oss", "snapkv"): "2 of 2 evicting layers .* sinks",
    ("gemma2", "streaming_llm"): "2 of 2 evicting layers .* softcap",
}

pytestmark = pytest.mark.skipif(not ops.interpreted(), reason="kernels run on a card here")


@pytest.fixture
def launched(monkeypatch) -> list[int]:
    """The slots of a head of every step that went to a kernel."""
    found: list[int] = []

    def counted(query, keys, values, bias, scaling, kernel):
        found.extend([keys.shape[2]] * kernel)
        return slot_attention(query, keys, values, bias, scaling, kernel)

    monkeypatch.setattr(attention, "slot_attention", counted)
    return found


def generated(name: str, method: str, kernels: str) -> tuple[list[list[int]], EvictingCache]:
    """Tokens after a prompt from which was evicted."""
    model, policy = build(name), methods.load(method).policy(12, slack=4, sinks=2, recent=4)
    ids = tokens(model, 1, 20)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="layers .* keep their stock cache")
        attached = attach(model, policy, kernels=kernels)
    with attached as cache:
        how = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **how)
    return out.tolist(), cache


@pytest.mark.parametrize(("name", "method"), sorted(SERVED))
def test_kernels_change_no_token(name, method, launched):
    off, plain = generated(name, method, "off")
    assert not launched
    on, cache = generated(name, method, "on")
    assert len(launched) == 2 * (STEPS - 1)
    assert on == off
    assert all(torch.equal(cache.positions(i), plain.positions(i)) for i in cache.evicting)


@pytest.mark.parametrize(("name", "method"), sorted(TORCH))
def test_what_kernels_leave_to_torch_is_said_once(name, method, launched):
    off, _ = generated(name, method, "off")
    with pytest.warns(KernelUnusedWarning, match=TORCH[name, method]) as said:
        on, _ = generated(name, method, "on")
    assert (len(said), launched, on) == (1, [], off)


def test_infer_answers_the_same_with_kernels(capsys, launched):
    found = {}
    for choice in ("off", "on"):
        words = f"infer --task recall --method streaming_llm --budget 24 -n 2 --json --device cpu --kernels {choice}"
        assert main(words.split()) == 0
        found[choice] = json.loads(capsys.readouterr().out)["text"]
    assert found["on"] == found["off"]
    assert launched


def test_auto_leaves_a_cpu_to_torch(launched):
    assert generated("llama", "streaming_llm", "auto")[0]
    assert not launched
    assert ops.default()[0] is False


def test_the_choice_is_one_of_its_thread_and_of_its_cache():
    config, policy, elsewhere = build("llama").config, methods.load("snapkv").policy(48, slack=8), []
    with using_kernels("on"):
        here = EvictingCache(config, policy)
        off = EvictingCache(config, policy, kernels="off")
        thread = threading.Thread(target=lambda: elsewhere.append(EvictingCache(config, policy)))
        thread.start()
        thread.join()
    after = EvictingCache(config, policy)
    assert [one.kernels.choice for one in (here, off, *elsewhere, after)] == ["on", "off", "auto", "auto"]


def test_on_is_an_error_where_nothing_can_run(monkeypatch, capsys):
    model, policy = build("llama"), methods.load("snapkv").policy(48, slack=8)
    with pytest.raises(UsageError, match="auto, on, off"):
        ops.check_choice("yes")
    assert main("infer --task recall --kernels on".split()) == 2
    assert "--budget" in capsys.readouterr().err
    monkeypatch.setattr(ops, "interpreted", lambda: False)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="CUDA device"):
            attach(model, policy, kernels="on")
        assert "CUDA" in ops.default()[1]
    monkeypatch.setattr(ops, "missing", lambda: None)
    with pytest.raises(ModelError, match="move the model"):
        attach(model, policy, kernels="on")
    assert ops.default()[0] is True
    monkeypatch.undo()
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install"):
        attach(model, policy, kernels="on")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (torch.zeros(1, 34, 1, 8), "16 query heads"),
        (torch.zeros(1, 2, 1, 288), "wider"),
        (torch.zeros(1, 2, 1, 8, dtype=torch.float64), "float64"),
        (torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(1, 2, 1, 8, requires_grad=True), "gradient"),
        (torch.zeros(1, 2, 1, 8), None),
    ],
)
def test_what_the_kernel_cannot_answer(query, reason):
    found = unfit(query, 2)
    assert found is None if reason is None else reason in found
