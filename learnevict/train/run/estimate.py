"""Estimates what a run takes, from the configuration of the base alone: bytes in every process, operations, and how many GPUs.

No weight is loaded. Torch counts what it can: weights and operations of the base on the meta device, and what a backward pass
saves, on fake tensors and on a few tokens of a gate of one layer. The rest are the formulas of learnevict.train.run.phases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, TrainingArguments

from learnevict import methods
from learnevict.config import Budget, Layout, readable_bytes
from learnevict.errors import UsageError
from learnevict.infer.model.memory import num_parameters
from learnevict.infer.model.supported import layout_of
from learnevict.oracle import Received
from learnevict.parts.learned import Learner, SlotScorer
from learnevict.policy import Gate
from learnevict.signals import Attention
from learnevict.train.run.flags import check_fields, flag
from learnevict.train.run.phases import PHASES, Phases, RunPlan, Shapes
from learnevict.train.trainers.layer_batch import LayerBatch, UnpaddedPositions

FEW, MORE = 32, 96
LIBRARIES = 512 * 2**20
"""Bytes of Python with torch, transformers and trl on a CPU, as measured; the context of a GPU takes about as much."""


@dataclass(frozen=True)
class Figures:
    """What a run takes; bytes are those of one process, operations those of one step in one process."""

    plan: RunPlan
    parameters: int  # of the base
    base: int  # bytes of its weights
    gate_parameters: int  # of the gates, all of them trained
    gates: dict[str, int]  # bytes of gates, gradients and AdamW's moments: DDP, ZeRO-2, ZeRO-3
    phases: Phases  # what is held beside at the same time, in each part of a step: {phase: {what: bytes}}
    operations: dict[str, float]  # floating-point operations, {what: number}
    stored: int  # bytes of the labels of one text in a label store, in float16

    @property
    def working(self) -> int:
        """The bytes beside the weights in the phase that needs most."""
        return max(sum(parts.values()) for parts in self.phases.values())


def estimate(config: PreTrainedConfig, method: str, plan: RunPlan) -> Figures:
    """Estimates a run with gates of this method, a name or an import path.

    Raises:
        ModelError: cache layers that learnevict does not serve.
    """
    layout = layout_of(config)
    with torch.device("meta"):
        gate: Gate = methods.load(method).build(layout, **plan.settings)
    one_layer = methods.load(method).build(replace(layout, num_layers=1), **plan.settings)
    gate_bytes = 0.0 if plan.mode == "probe" else _slope(lambda n: saved_bytes(lambda: _ask(one_layer, layout, n)))
    shapes = Shapes(config, gate, plan, gate_bytes, base_saved(config, plan.dtype) if plan.mode == "soft" else 0.0)
    parameters, trained = num_parameters(config), sum(parameter.numel() for parameter in gate.parameters())
    part = -(-trained // plan.processes)  # float32: weights, gradients and two moments; ZeRO keeps a copy of its part
    states = {"DDP": 16 * trained, "ZeRO-2": 4 * trained + 16 * part, "ZeRO-3": 8 * trained + 20 * part}
    return Figures(
        plan,
        parameters,
        parameters * shapes.number,
        trained,
        states,
        PHASES[plan.mode](shapes),
        operations(shapes, base_operations(config), trained),
        shapes.labels(shapes.heads) // plan.rows // 2,
    )


def saved_bytes(run: Callable[[], Any], *modules: nn.Module) -> int:
    """Returns the bytes that `run` saves for the backward pass, beside the modules' own weights; shared memory counts once."""
    own = {part.untyped_storage()._cdata for module in modules for part in [*module.parameters(), *module.buffers()]}
    found: dict[int, torch.UntypedStorage] = {}  # which keeps them alive, so that no address is given out twice

    def save(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory._cdata not in own:
            found[memory._cdata] = memory
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        run()
    return sum(memory.nbytes() for memory in found.values())


def _slope(measured: Callable[[int], float]) -> float:
    """Returns by how much a measure grows with every token."""
    return (measured(MORE) - measured(FEW)) / (MORE - FEW)


def _ask(gate: Gate, layout: Layout, tokens: int) -> Any:
    """Asks a gate of one layer about a text, or about so many slots, as its trainer does."""
    if isinstance(gate, SlotScorer):
        return gate.score_features(0, torch.zeros(1, layout.num_heads, tokens, gate.num_features))
    ids = torch.zeros(1, tokens, dtype=torch.long)
    query = torch.zeros(1, layout.num_query_heads, tokens, layout.head_dim)
    key = torch.zeros(1, layout.num_heads, tokens, layout.head_dim)
    value = torch.zeros(1, layout.num_heads, tokens, layout.value_dim)
    attention = Attention(layout.head_dim**-0.5, frequencies=torch.ones(layout.head_dim // 2))
    received = Received(query, key, value, torch.zeros(1, tokens, layout.hidden_size), attention)
    batch = LayerBatch.of(0, UnpaddedPositions.of(ids, torch.ones_like(ids, dtype=torch.bool)), received)
    written = gate.write(batch.written(gate.columns))
    if not (isinstance(gate, Learner) and gate.at_cuts):
        return written
    seen = torch.full((1,), tokens)
    return gate.predictions(batch.event(seen, tokens, seen.int(), batch.state(written, gate.columns), gate.window))


def base_saved(config: PreTrainedConfig, dtype: torch.dtype | None) -> float:
    """Returns the bytes per token that all layers of the frozen base save where gradients pass through them."""
    with FakeTensorMode():
        model: Any = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=dtype or config.dtype, trust_remote_code=False
        )
        model.requires_grad_(False)

        def saved(tokens: int) -> int:
            text = torch.zeros(1, tokens, config.get_text_config(decoder=True).hidden_size, dtype=model.dtype)
            return saved_bytes(
                lambda: model(inputs_embeds=text.requires_grad_(), use_cache=True, logits_to_keep=1), model
            )

        return _slope(saved)


def base_operations(config: PreTrainedConfig) -> int:
    """Returns the floating-point operations of the base for one token, attention left out but to itself."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model: Any = AutoModelForCausalLM.from_config(
            deepcopy(config), experts_implementation="batched_mm", trust_remote_code=False
        )
        model(torch.zeros(1, 1, dtype=torch.long), use_cache=True)
    return counter.get_total_flops()


def operations(shapes: Shapes, per_token: int, trained: int) -> dict[str, float]:
    """Returns the floating-point operations of a step in one process, a multiplication and an addition counting two.

    Attention takes 2 (d + dv) for each query head and each pair of a token and one before it; going back through frozen weights
    takes one pass more, for inputs alone. The oracle forms the products of queries and keys again. Gates take 2 for each weight
    of a head and each slot or token, three times that with gradient.
    """
    plan, layout = shapes.plan, shapes.layout
    heads = layout.num_layers * layout.num_query_heads
    pairs, few = plan.tokens * (plan.tokens + 1) / 2 * heads, shapes.largest * plan.tokens * heads
    full, bounded = (
        plan.rows * (per_token * plan.tokens + 2 * (layout.head_dim + layout.value_dim) * n) for n in (pairs, few)
    )
    oracle = plan.rows * 2 * layout.head_dim * pairs
    slots = shapes.states * trained / max(layout.num_layers * layout.num_heads, 1)
    tokens = plan.rows * plan.tokens * trained
    making = {} if plan.stored_labels else {"labels": full + oracle}
    again = full if plan.recompute else 0.0
    return {
        "replay": {**making, "recorded run": bounded, "gates": 8 * slots},
        "stream": {"reading": full + oracle, "gates": 6 * tokens * (plan.cuts if shapes.at_cuts else 1)},
        "soft": {"teacher": full, "student, there and back": 2 * full + again, "gates": 6 * tokens},
        "probe": {"targets": full + oracle, "probe": full, "gates": 6.0 * trained * plan.rows * (plan.cuts + 1)},
        "grpo": {"traces": bounded, "full caches and credit": 2 * full / plan.group, "gates": 10 * slots},
    }[plan.mode]


def report(figures: Figures, gpu_memory: str) -> str:
    """Returns a table for people, and on how many GPUs of so much memory, such as 80GiB, the run fits.

    Raises:
        UsageError: no such memory.
    """
    plan, room, lines = figures.plan, memory_of(gpu_memory), list[str]()

    def row(what: str, count: int, note: str = "") -> None:
        lines.append(f"  {what:<44}{readable_bytes(count):>12}  {note}".rstrip())

    lines += [
        f"An estimate of mode {plan.mode}: {plan.rows} x {plan.tokens} tokens a process, {plan.processes} processes", ""
    ]  # fmt: skip
    row("Python and its libraries, or a GPU's context", LIBRARIES)
    row("base, frozen, all of it in every process", figures.base, f"{figures.parameters:,} weights")
    row("gates, gradients, AdamW: DDP", figures.gates["DDP"], f"{figures.gate_parameters:,} weights")
    row("the same: ZeRO-2", figures.gates["ZeRO-2"])
    row("the same: ZeRO-3", figures.gates["ZeRO-3"])
    if plan.mode in ("replay", "stream"):
        row("labels of a text, if they are stored", figures.stored, "float16, on a disk")
    for phase, parts in figures.phases.items():
        lines += ["", f"{phase}, at most at the same time"]
        for what in filter(parts.get, parts):
            row(what, parts[what])
    lines += [""]
    for stage in figures.gates:
        row(f"a process at its peak: {stage}", LIBRARIES + figures.base + figures.gates[stage] + figures.working)
    step = sum(figures.operations.values()) * plan.processes
    lines += ["", *(f"  {what + ', per step':<44}{count:>12.3g} FLOP" for what, count in figures.operations.items())]
    lines += [f"  {f'all of it, in {plan.steps} steps of all processes':<44}{step * plan.steps:>12.3g} FLOP"]
    return "\n".join([*lines, "", fits(figures, room, gpu_memory)])


def fits(figures: Figures, room: int, gpu_memory: str) -> str:
    """Says on how many GPUs of so many bytes the run fits, if each takes as many rows as it can hold."""
    plan, least = figures.plan, min(figures.gates, key=lambda stage: figures.gates[stage])
    fixed, per_row = LIBRARIES + figures.base + figures.gates[least], -(-figures.working // plan.rows)
    rows = max(room - fixed, 0) // max(per_row, 1)
    if rows == 0:
        return (
            f"Does not fit on GPUs of {gpu_memory}, however many: one row alone is {readable_bytes(fixed + per_row - room)} "
            "too much. Shorter texts, a longer period or smaller budgets take less."
        )
    unit = plan.group if plan.mode == "grpo" else 1
    if rows < unit:
        return f"Does not fit on GPUs of {gpu_memory}: a process needs a whole group of {unit} traces, and {rows} fit."
    batch, most = plan.rows * plan.processes, rows // unit * unit
    needed = -(-batch // most)
    return (
        f"Fits on GPUs of {gpu_memory}, up to {most} rows on each ({least}): on {needed} for all {batch} rows of a step at "
        f"once{', on fewer with gradient accumulation' if needed > 1 else ''}."
    )


def length_of(training: TrainingArguments, gpus: int, documents: int) -> dict[str, int]:
    """Returns the processes that share a batch, `gpus` or those that were launched, and the steps until the end."""
    processes = gpus or training.world_size
    batch = training.per_device_train_batch_size * processes * training.gradient_accumulation_steps
    epochs = math.ceil(training.num_train_epochs * documents / batch)
    return {"processes": processes, "steps": training.max_steps if training.max_steps > 0 else max(epochs, 1)}


@dataclass
class ProgramFlags:
    """Flags of every program that trains: trying it, and estimating what it would take."""

    smoke: bool = flag(False, "seconds instead of minutes, the same code")
    dry_run: bool = flag(
        False, "print what the run would take, and do nothing; only the configuration of the model is read"
    )
    gpu_memory: str = flag("80GiB", "of one GPU, for that")
    gpus: int = flag(0, "that the run would have, for that; otherwise as many as processes were launched")

    def __post_init__(self) -> None:
        check_fields(self)
        memory_of(self.gpu_memory)


def memory_of(text: str) -> int:
    """Returns the bytes of a text such as 80GiB.

    Raises:
        UsageError: it is none.
    """
    budget = Budget.parse(text)
    if budget.unit != "bytes":
        raise UsageError(f"gpu_memory {text!r} is no memory; give 80GiB, for instance")
    return int(budget.amount)
