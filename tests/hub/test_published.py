"""Gates from published weights: their scores against the papers' formulas in float64, on the tensors as they were published."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from learnevict import Gates, testbed
from learnevict.cli import main
from learnevict.errors import GateError, TrainedOtherwiseWarning
from learnevict.hub.published import import_gates
from learnevict.infer.soft import Sequence
from learnevict.signals import Attention, Rows, Signals
from tests.laws import zoo

LAYERS, HEADS, GROUP, WIDTH = 2, 2, 2, 32  # of the zoo's llama
RETENTION = "model.layers.{}.self_attn.retention_gate.{}"
ACTIVATIONS = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}


def random(shapes: dict[str, tuple[int, ...]], layers: int = LAYERS) -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(5)
    return [
        {name: torch.randn(shape, generator=draws).mul(0.3).bfloat16() for name, shape in shapes.items()}
        for _ in range(layers)
    ]


def named(pattern: str, layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {pattern.format(i, name): part for i, layer in enumerate(layers) for name, part in layer.items()}


def kvzap(folder: Path, kind: str, heads: int = HEADS, width: int = WIDTH, layers: int = LAYERS):
    linear = {"weight": (heads, width), "bias": (heads,)}
    mlp = {"0.weight": (5, width), "0.bias": (5,), "2.weight": (heads, 5), "2.bias": (heads,)}
    found = random(linear if kind == "linear" else mlp, layers)
    save_file(named("module_list.{}.{}" if kind == "linear" else "layers.{}.{}", found), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "kvzap", "hidden_dim": 5}))
    return found


def fast_kvzip(folder: Path):
    rank, sinks = 4, 3
    shapes = {
        "q_proj.weight": (HEADS * GROUP * rank, WIDTH), "q_proj.bias": (HEADS * GROUP * rank,),
        "k_proj.weight": (HEADS * rank, WIDTH), "q_norm.weight": (rank,), "k_norm.weight": (rank,),
        "k_base": (HEADS, 1, sinks, rank), "b": (HEADS, 1, GROUP),
    }  # fmt: skip
    found = random(shapes)
    torch.save({"module": found, "loss": np.zeros((2, 3)), "acc": np.ones(2)}, folder / "q2_dim4_sink3.pt")
    return found


def trimkv(folder: Path, kind: str):
    hidden = 6
    shapes = {"linear1.weight": (hidden, WIDTH), "linear1.bias": (hidden,)}
    if kind != "one hidden layer":
        shapes |= {"linear2.weight": (hidden, hidden), "linear2.bias": (hidden,)}
    shapes |= {f"linear{len(shapes) // 2 + 1}.weight": (HEADS, hidden), "bias": (HEADS,)}
    found = random(shapes)
    if kind == "shared output":
        found[1] |= {name: found[0][name] for name in ("linear3.weight", "bias")}
    torch.save(named(RETENTION, found), folder / "trimkv_weights.pth")
    activation = {"hidden_act": "gelu"} if kind == "shared output" else {}
    (folder / "config.json").write_text(json.dumps({"base_model": "zoo/llama", **activation}))
    return found


def kvzap_formula(layer: dict[str, Tensor], h: Tensor, _: str) -> Tensor:
    if "weight" in layer:
        return torch.einsum("bte,he->bht", h, layer["weight"]) + layer["bias"].view(1, -1, 1)
    inner = torch.einsum("bte,je->btj", h, layer["0.weight"]) + layer["0.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return torch.einsum("btj,hj->bht", inner, layer["2.weight"]) + layer["2.bias"].view(1, -1, 1)


def fast_kvzip_formula(layer: dict[str, Tensor], h: Tensor, _: str) -> Tensor:
    """Share of a softmax over the token's own logit and those of the sinks, query head by query head."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    rank = len(layer["q_norm.weight"])
    q, k = h @ layer["q_proj.weight"].T + layer["q_proj.bias"], h @ layer["k_proj.weight"].T
    score = torch.zeros(h.shape[0], HEADS, h.shape[1], dtype=torch.float64)
    for head in range(HEADS):
        key = norm(k[..., head * rank : (head + 1) * rank], layer["k_norm.weight"])
        for group in range(GROUP):
            start = (head * GROUP + group) * rank
            query = norm(q[..., start : start + rank], layer["q_norm.weight"])
            own = (query * key).sum(-1, keepdim=True) / math.sqrt(rank) + layer["b"][head, 0, group]
            sinks = query @ layer["k_base"][head, 0].T / math.sqrt(rank)
            score[:, head] += torch.cat([own, sinks], -1).softmax(-1)[..., 0] / GROUP
    return score


def trimkv_formula(layer: dict[str, Tensor], h: Tensor, activation: str) -> Tensor:
    act = ACTIVATIONS[activation]
    x = act(h @ layer["linear1.weight"].T + layer["linear1.bias"])
    if "linear3.weight" in layer:
        x = act(x @ layer["linear2.weight"].T + layer["linear2.bias"])
    z = x @ layer.get("linear3.weight", layer["linear2.weight"]).T + layer["bias"]
    return -torch.log1p(torch.exp(-z)).transpose(1, 2)


def signals(layer: int, hidden: Tensor) -> Signals:
    """Fresh tokens of a layer; gates of this file read nothing else of them."""
    rows, tokens = hidden.shape[:2]
    states, position = torch.zeros(rows, HEADS, tokens, 4), torch.arange(tokens).int().expand(rows, HEADS, -1)
    ends = torch.full((rows,), tokens, dtype=torch.int32)
    return Signals(
        layer=layer, slots=Sequence(states, states, position), rows=Rows(0 * ends, ends, ends, ends, ends), budget=ends,
        state={}, query=states, query_position=position[:, 0], attention=Attention(1.0), hidden=hidden,
    )  # fmt: skip


KINDS = {
    "kvzap linear": (lambda folder: kvzap(folder, "linear"), kvzap_formula, "estimate"),
    "kvzap mlp": (lambda folder: kvzap(folder, "mlp"), kvzap_formula, "estimate"),
    "fast_kvzip": (fast_kvzip, fast_kvzip_formula, "estimate"),
    "trimkv": (lambda folder: trimkv(folder, "one hidden layer"), trimkv_formula, "retention"),
    "dbtrimkv": (lambda folder: trimkv(folder, "own output"), trimkv_formula, "retention"),
    "dbtrimkv shared": (lambda folder: trimkv(folder, "shared output"), trimkv_formula, "retention"),
}


@pytest.fixture
def base(monkeypatch):
    model = zoo.build("llama")
    monkeypatch.setattr(model, "name_or_path", "zoo/llama")  # the zoo's models are shared
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_imported_gates_score_as_the_papers_say(tmp_path, base, kind):
    write, formula, column = KINDS[kind]
    published = write(tmp_path)
    import_gates(tmp_path, base, allow_pickle=True).save_pretrained(tmp_path / "gates")
    gates = Gates.load(tmp_path / "gates", base)
    assert gates.method == kind.split()[0]
    assert gates.policy(200).scope == ("model" if "db" in kind else "layer")
    assert len(gates.config.training["sha256"]) == 64
    hidden = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(2))
    for layer, tensors in enumerate(published):
        want = formula({name: part.double() for name, part in tensors.items()}, hidden.double(), base_act(kind))
        found = gates.gate.write(signals(layer, hidden))[column]
        assert want.std() > 1e-3
        assert torch.allclose(found.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def base_act(kind: str) -> str:
    return "gelu" if kind == "dbtrimkv shared" else "silu"  # of the authors' config.json, or of the base's


class Runs:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: None, "no weights in .*hf download"),
        (lambda folder: fast_kvzip(folder), "is a pickle.*--allow-pickle"),
        (lambda folder: (fast_kvzip(folder), kvzap(folder, "mlp")), "2 files of weights"),
        (
            lambda folder: kvzap(folder, "mlp", width=48),
            r"another model: weight_in would be \[2, 48, 5\].*\[2, 32, 5\]",
        ),
        (lambda folder: kvzap(folder, "linear", layers=3), r"another model: weight would be \[3, 32, 2\]"),
        (lambda folder: save_file({"a.b": torch.ones(2)}, folder / "w.safetensors"), "no method known here .*a.b"),
        (lambda folder: (folder / "w.safetensors").write_bytes(b"{}"), "cannot read tensors"),
        (
            lambda folder: save_file({"layers.1.weight": torch.ones(2, 2)}, folder / "w.safetensors"),
            "lacks tensors of some of its layers",
        ),
        (
            lambda folder: save_file({"layers.0.weight": torch.ones(2, 2)}, folder / "w.safetensors"),
            "its layers have weight, but should be kvzap",
        ),
    ],
)
def test_what_cannot_be_imported_says_why(tmp_path, base, spoil, said):
    spoil(tmp_path)
    with pytest.raises(GateError, match=said):
        import_gates(tmp_path, base)


def test_a_pickle_of_published_weights_runs_nothing(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"module": [Runs()]}, protocol=2))
    torch.save([Runs()], tmp_path / "v.pth")
    torch.save({"module": [1]}, tmp_path / "plain.pth")
    with pytest.raises(GateError, match="holds something else than named tensors"):
        import_gates(tmp_path / "plain.pth", base, allow_pickle=True)
    for name in ("w.pth", "v.pth"):
        with pytest.raises(GateError, match="cannot read tensors from"):
            import_gates(tmp_path / name, base, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_another_base_than_the_authors_is_said(tmp_path, base, monkeypatch):
    trimkv(tmp_path, "one hidden layer")
    monkeypatch.setattr(base, "name_or_path", "zoo/mistral")
    with pytest.warns(TrainedOtherwiseWarning, match="trained on 'zoo/llama', and is imported for 'zoo/mistral'"):
        import_gates(tmp_path, base, allow_pickle=True)


def test_import_then_infer(tmp_path, capsys):
    layout = testbed.load()[0].config
    source, out = tmp_path / "published", tmp_path / "gates"
    source.mkdir()
    kvzap(source, "mlp", layout.num_key_value_heads, layout.hidden_size, layout.num_hidden_layers)
    words = ["import", str(source), "--model", "testbed", "--out", str(out)]
    assert main(words) == 0, capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(words) == 2 and "nothing is replaced; choose another --out" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["infer", "--task", "recall", "--budget", "48", "-n", "2", "--ckpt", str(out)]) == 0
