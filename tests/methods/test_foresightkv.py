"""The scorer against formulas written anew, and against the faults of its reference implementation."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learnevict import attach, methods, oracle
from learnevict.config import Budget
from learnevict.errors import GateError, TrainedOtherwiseWarning
from learnevict.hub import Gates, layout_of
from learnevict.infer.soft import Sequence
from learnevict.infer.teacher_forcing import prefill, replay
from learnevict.methods.foresightkv import DECAY, NEEDED, RECENT, ForesightGate
from learnevict.policy import Guard, Schedule
from learnevict.signals import Attention, Rows, Signals
from learnevict.train.trainers.pairwise import joined
from learnevict.train.trainers.replay_states import record_states
from tests.closeness import close

PERIOD, BUDGET, WINDOW = 8, 24, 8


def tiny(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).eval()


def gate_for(model: Qwen3ForCausalLM) -> ForesightGate:
    torch.manual_seed(5)
    gate = ForesightGate(layout_of(model.config), hidden=8, window=WINDOW)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    return gate


def run(model: Qwen3ForCausalLM, gate: ForesightGate, ids: torch.Tensor, mask: torch.Tensor | None = None):
    policy = methods.foresightkv.policy(BUDGET, gate=gate, slack=PERIOD)
    with torch.no_grad(), attach(model, policy, record=True) as cache:
        logits = prefill(model, cache, ids, mask)
    return logits, cache.trace()


class Dense:
    """One layer and head, simulated in float64 with a plain list of survivors."""

    def __init__(self, gate: ForesightGate, layer: int, head: int, query, key, value, scaling: float) -> None:
        self.gate, self.layer, self.head = gate, layer, head
        self.query, self.key, self.value = query.double(), key.double(), value.double()
        self.scaling = scaling
        self.held: list[int] = []
        self.state: dict[int, dict[str, torch.Tensor]] = {}

    def attention(self, now: int) -> torch.Tensor:
        """[window, held, G] of the last queries over the held tokens."""
        first = max(0, now + 1 - WINDOW)
        rows = []
        for t in range(first, now + 1):
            logits = torch.stack([self.query[:, t] @ self.key[i] * self.scaling for i in self.held])
            logits[torch.tensor([i > t for i in self.held])] = -math.inf
            rows.append(torch.softmax(logits, dim=0) if t >= self.held[0] else torch.zeros_like(logits))
        return torch.stack(rows)

    def event(self, now: int) -> dict[int, float]:
        paid = self.attention(now)
        seen, scores = now + 1, {}
        for column, i in enumerate(self.held):
            a = paid[:, column]
            mean, top = a.sum(0) / min(seen, WINDOW), a.amax(0)
            own = self.state.setdefault(
                i, {"paid": 0 * mean, "decayed": 0 * mean, "peak": 0 * mean, "n": 0.0, "idle": 0.0}
            )
            left = DECAY ** (PERIOD / 16)
            own["paid"] = own["paid"] + PERIOD * mean
            own["decayed"] = left * own["decayed"] + (1 - left) * mean
            own["peak"] = torch.maximum(own["peak"], top)
            own["n"] += PERIOD
            own["idle"] = 0.0 if float(top.max()) > NEEDED else own["idle"] + PERIOD
            recent = [a[-span:].sum(0) / span for span in RECENT]
            attention = [
                mean,
                top,
                *recent,
                own["paid"] / own["n"],
                own["decayed"],
                own["peak"],
            ]
            key = self.key[i]
            pairs = [math.hypot(float(key[c]), float(key[c + len(key) // 2])) for c in range(len(key) // 2)]
            scalars = [
                math.log1p(now - i),
                math.log(seen),
                math.log(min(1.0, BUDGET / seen)),
                math.log1p(own["idle"]),
                math.log1p(i),
            ]
            x = torch.cat(
                [
                    key,
                    torch.tensor(pairs),
                    self.value[i],
                    *[torch.log(p + 1e-4) for p in attention],
                    torch.tensor(scalars),
                ]
            )
            scores[i] = self.score(x.double())
        return scores

    def score(self, x: torch.Tensor) -> float:
        g, at = self.gate, (self.layer, self.head)
        x = (x - g.mean[at][0]) / g.scale[at][0]
        x = torch.nn.functional.gelu(x @ g.weight_in[at].double() + g.bias_in[at][0])
        x = torch.nn.functional.gelu(x @ g.weight_mid[at].double() + g.bias_mid[at][0])
        return float(x @ g.weight_out[at].double())

    def expiries(self, length: int) -> list[int]:
        expiry = [2**31 - 1] * length
        for t in range(length):
            self.held.append(t)
            if (t + 1) % PERIOD:
                continue
            scores = self.event(t)
            free = [i for i in self.held if i >= 4 and i <= t - max(8, PERIOD)]
            for i in sorted(free, key=lambda i: (scores[i], i))[: max(0, len(self.held) - BUDGET)]:
                self.held.remove(i)
                del self.state[i]
                expiry[i] = t + 1
        return expiry


def test_evictions_equal_a_dense_simulation():
    model, ids = tiny(), torch.randint(0, 64, (1, 61))
    gate = gate_for(model)
    _, trace = run(model, gate, ids)
    # keys and values of a layer depend on what was evicted below it, so they are read from a replay of the run itself
    seen = {}

    def observe(layer, received):
        parts = (received.query[0], received.key[0], received.value[0])
        seen[layer] = (*parts, received.attention.scaling)

    replay(model, ids, trace, observe=observe)
    for layer, (query, key, value, scaling) in seen.items():
        for head in range(2):
            with torch.no_grad():
                dense = Dense(gate, layer, head, query[2 * head : 2 * head + 2], key[head], value[head], scaling)
                assert trace.expiry[layer, 0, head].tolist() == dense.expiries(61)
    assert trace.evictions == 2 * 2 * (56 - BUDGET)


def test_recent_window_features_slice_the_query_axis():
    """Regression 1 of the reference: windows of 4 and 8 queries must differ from the full window's sums."""
    model, ids = tiny(), torch.randint(0, 64, (1, 40))
    gate = ForesightGate(layout_of(model.config), hidden=8, window=16)
    rows = []
    original = gate.statistics
    gate.statistics = lambda signals: rows.append(original(signals)) or rows[-1]  # type: ignore[method-assign]
    run(model, gate, ids)
    mean, last4, last8 = rows[-1][..., 0:2], rows[-1][..., 4:6], rows[-1][..., 6:8]
    assert not torch.allclose(last4, last8)
    assert not torch.allclose(last8, mean)


def test_accumulators_do_not_share_storage():
    """Regression 2: after two events, decayed and undecayed sums are those of both, each by its own formula."""
    model, ids = tiny(), torch.randint(0, 64, (1, 40))
    gate = gate_for(model)
    events = []
    original = gate.refresh

    def refresh(signals):
        state = original(signals)
        assert state["received"].data_ptr() != state["decayed"].data_ptr()
        if signals.layer == 0:
            events.append((signals.memo["window_mean"], {name: own.clone() for name, own in state.items()}))
        return state

    gate.refresh = refresh  # type: ignore[method-assign]
    run(model, gate, ids)
    (first, _), (second, state) = events[:2]  # nothing is evicted before 24 tokens, so slots stay where they are
    first = torch.nn.functional.pad(first, (0, 0, 0, second.shape[2] - first.shape[2]))
    left = DECAY ** (PERIOD / 16)
    assert not torch.allclose(first, second)
    close(state["received"], PERIOD * first + PERIOD * second)
    close(state["decayed"], left * (1 - left) * first + (1 - left) * second)


def test_state_under_steady_attention_do_not_depend_on_the_period():
    """Regression 4: training and inference may hold events at different distances; queries that all look alike tell it."""
    gate, num, tokens = gate_for(tiny()), 12, 64
    generator = torch.Generator().manual_seed(1)
    key = torch.randn(1, 2, num, 8, generator=generator)
    query = torch.randn(1, 4, 1, 8, generator=generator)
    paid = (query.view(1, 2, 2, 8) @ key.mT * 0.5).softmax(-1).mT  # [B, H, N, G]
    position = torch.arange(num, dtype=torch.int32).expand(1, 2, -1)

    def event(end: int, period: int, state: dict[str, torch.Tensor]) -> Signals:
        at = [torch.tensor([column], dtype=torch.int32) for column in (0, end - 1, end, end - period, num)]
        ring = (query.expand(-1, -1, WINDOW, -1), torch.arange(end - WINDOW, end, dtype=torch.int32).unsqueeze(0))
        rows, budget = Rows(*at), torch.tensor([BUDGET], dtype=torch.int32)
        slots = Sequence(key, key, position)
        return Signals(0, slots, rows, budget, state, ring[0], ring[1], Attention(0.5), ring=ring)

    found, shown = {}, {}
    for period in (1, 8, 32):
        state = {one.name: torch.full((1, 2, num, *one.shape), one.fill) for one in gate.columns}
        start = num + WINDOW  # from here on all queries of the window come after the slots
        for end in range(start + period, start + tokens + 1, period):
            state = gate.refresh(event(end, period, state))
        found[period], shown[period] = state, gate.statistics(event(start + tokens, period, state))
    wanted = {
        "received": tokens * paid,
        "decayed": (1 - DECAY ** (tokens / 16)) * paid,
        "peak": paid,
        "tokens": torch.full((1, 2, num), float(tokens)),
        "idle": torch.where(paid.amax(-1) > NEEDED, 0.0, float(tokens)),
    }
    assert 0 < int((wanted["idle"] > 0).sum()) < 2 * num
    for period, state in found.items():
        for name, own in wanted.items():
            close(state[name], own, about=f"{name}, {period}")
        close(shown[period], shown[1])


def test_trained_gates_keep_its_period(tmp_path):
    """Its policy uses it by default; another one is said, not hidden."""
    Gates.make("foresightkv", tiny(), hidden=8, period=16).save_pretrained(tmp_path)
    gates = Gates.from_pretrained(tmp_path)
    assert gates.policy(64).schedule.slack == 16
    with pytest.warns(TrainedOtherwiseWarning, match="every 16 tokens, not every 8"):
        assert gates.policy(64, slack=8).schedule.slack == 8


def test_training_sees_what_inference_sees():
    """No skew: features recorded in a training run equal those of an inference run with the same evictions."""
    model = tiny()
    gate = gate_for(model)
    ids = torch.randint(0, 64, (2, 48))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    labels, _ = oracle.golden_labels(model, ids, mask, block=PERIOD)
    taken = []
    original = gate.features

    def watch(keys, values, state):
        taken.append(original(keys, values, state))
        return taken[-1]

    states = record_states(
        model,
        gate,
        labels,
        ids,
        mask,
        budget=BUDGET,
        schedule=Schedule(PERIOD),
        guard=Guard(),
        own=torch.ones(2, dtype=torch.bool),
    )
    ends = torch.tensor([41, 48])
    assert 48 % PERIOD == 0
    row, seen = torch.cat(states[0].events).unbind(-1)
    assert len(seen) and bool((seen < ends[row]).all()), "after the last token there is nothing to learn from"
    _, trace = run(model, gate, ids, mask)
    assert trace.evictions > 0
    gate.features = watch  # type: ignore[method-assign]
    run(model, gate, ids, mask)
    trained = torch.cat([part.flatten(0, 2) for s in states.values() for part in s.features])
    served = torch.cat([part.flatten(0, 2) for part in taken])
    # every recorded state occurs in the served run (which also scores rows whose event it is not)
    nearest = torch.cdist(trained.double(), served.double()).min(-1).values
    assert float(nearest.max()) < 1e-5


def test_golden_rows_follow_the_oracle():
    """A recorder whose rows all follow the oracle leaves the golden trace behind."""
    model, ids = tiny(), torch.randint(0, 64, (2, 48))
    labels, _ = oracle.golden_labels(model, ids, block=PERIOD)
    from learnevict.train.trainers.replay_states import Recorder, look_ahead

    ahead = [look_ahead(part) for part in labels if part is not None]
    recorder = Recorder(
        Budget(BUDGET),
        gate_for(model),
        list(ahead),
        torch.zeros(2, dtype=torch.bool),
        Schedule(PERIOD),
        Guard(),
        torch.tensor([48, 48]),
    )
    with torch.no_grad(), attach(model, recorder, record=True) as cache:
        model(ids, past_key_values=cache)
    want = oracle.golden(labels, budget=BUDGET, block=PERIOD, guard=Guard())
    assert torch.equal(cache.trace().expiry, want.expiry)
    assert want.evictions > 0


def test_gates_survive_a_round_trip(tmp_path):
    model = tiny()
    gates = Gates.make("foresightkv", model, hidden=8, window=WINDOW)
    with torch.no_grad():
        gates.gate.weight_out.normal_()
    gates.save_pretrained(tmp_path)
    again = Gates.load(tmp_path, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for name, tensor in gates.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_gates_refuse_another_base(tmp_path):
    model = tiny()
    Gates.make("foresightkv", model, hidden=8).save_pretrained(tmp_path)
    with pytest.raises(GateError, match="trained on other weights"):
        Gates.load(tmp_path, tiny(1))
    Gates.load(tmp_path, tiny(1), allow_other_base=True)
    wider = Qwen3ForCausalLM(Qwen3Config(**{**model.config.to_dict(), "vocab_size": 65}))
    with pytest.raises(GateError, match="vocab_size 64"):
        Gates.load(tmp_path, wider, allow_other_base=True)
    with pytest.raises(GateError, match="no gates in"):
        Gates.load(tmp_path / "nothing", model)


def test_states_of_all_layers_belong_together_where_all_heads_compete():
    """Scope "model": rows that follow the oracle share the slots of all heads out by label, above the floor."""
    model, ids = tiny(), torch.randint(0, 64, (2, 48))
    gate = gate_for(model)
    gate.scope = "model"
    labels, _ = oracle.golden_labels(model, ids, block=PERIOD)
    rules = {"budget": BUDGET, "schedule": Schedule(PERIOD), "guard": Guard()}
    states = record_states(
        model, gate, labels, ids, torch.ones_like(ids), own=torch.zeros(2, dtype=torch.bool), scope="model", **rules
    )
    stacked = {layer: part.stacked() for layer, part in states.items()}
    assert len({part[1].shape[0] for part in stacked.values()}) == 1, "layers recorded different events"
    held = torch.stack([(part[2].sum(-1)) for part in stacked.values()])
    assert len(set(held[:, -1].flatten().tolist())) > 1, "heads hold all the same, so nothing was shared out"
    raced = joined([(part[1], part[1], part[2]) for part in stacked.values()])
    assert raced[0].shape[1] == 1
    assert int(raced[2].sum()) == sum(int(part[2].sum()) for part in stacked.values())
