"""What a run takes, from the configuration of the base alone: bytes in every process, operations, and on how many GPUs it fits.

    print(report(estimate(load_config("user/model"), "foresightkv", RunPlan("replay", tokens=32768)), "80GiB"))

Nothing is loaded and nothing allocated. Counts of weights and bytes of labels are exact; what is recorded and cached follows
from shapes that the tests compare with real runs; activations and operations are rules of thumb
(learnevict.train.memory.phases), and
so is the total. It is an estimate: leave room.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedConfig

from learnevict import methods
from learnevict.config import Budget
from learnevict.errors import UsageError
from learnevict.infer.model.fingerprint import layout_of
from learnevict.infer.model.memory import num_parameters
from learnevict.policy import Gate
from learnevict.train.memory.phases import LEARNING, Phases, RunPlan, Shapes
from learnevict.train.memory.saved_activations import bytes_per_token

STAGES = ("DDP", "ZeRO-2", "ZeRO-3")


@dataclass(frozen=True)
class Figures:
    """What a run takes; bytes are those of one process.

    Attributes:
        plan: of the run.
        parameters: of the base.
        base: bytes of its weights.
        gate_parameters: of the gates, all of them trained.
        gates: bytes of gates, gradients and optimizer, by how they are shared out.
        phases: what is held beside at the same time, in each part of a step: {phase: {what: bytes}}.
        operations: floating-point operations of one step, {what: number}.
        stored: bytes of the labels of one text in a label store, in float16.
    """

    plan: RunPlan
    parameters: int
    base: int
    gate_parameters: int
    gates: dict[str, int]
    phases: Phases
    operations: dict[str, float]
    stored: int

    @property
    def working(self) -> int:
        """Bytes beside the weights in the phase that needs most."""
        return max(sum(parts.values()) for parts in self.phases.values())

    def total(self, stage: str) -> int:
        """Bytes of a process, at most."""
        return self.base + self.gates[stage] + self.working


def estimate(config: PreTrainedConfig, method: str, plan: RunPlan) -> Figures:
    """What a run takes.

    Args:
        config: of the base.
        method: whose gates are trained, a name or an import path.
        plan: of the run.

    Raises:
        ModelError: cache layers that learnevict does not serve.
    """
    build, layout = partial(methods.load(method).build, **plan.settings), layout_of(config)
    with torch.device("meta"):
        gate: Gate = build(layout)
    shapes = Shapes(config, gate, plan, 0.0 if plan.mode == "probe" else bytes_per_token(build, layout))
    parameters = num_parameters(config)
    trained = sum(parameter.numel() for parameter in gate.parameters())
    return Figures(
        plan,
        parameters,
        parameters * shapes.number,
        trained,
        {stage: states_of(stage, trained, plan.processes) for stage in STAGES},
        LEARNING[plan.mode](shapes),
        operations(shapes, parameters, trained),
        shapes.labels() // plan.rows // 2,
    )


def states_of(stage: str, parameters: int, processes: int) -> int:
    """Bytes of gates, gradients and AdamW's two moments in a process, all float32.

    DDP holds 16 bytes a parameter. ZeRO deals out the moments and a copy of the weights that it keeps, ZeRO-2 also the
    gradients, ZeRO-3 also the weights; the latter gathers them for a pass, and once more for what happens outside of one.
    """
    part = -(-parameters // processes)
    return {"DDP": 16 * parameters, "ZeRO-2": 4 * parameters + 16 * part, "ZeRO-3": 8 * parameters + 20 * part}[stage]


def operations(shapes: Shapes, parameters: int, trained: int) -> dict[str, float]:
    """Floating-point operations of a step in one process, a multiplication and an addition counting two.

    A pass of the base takes 2 for each weight but the embedding's and each token, and 2 Hq (d + dv) for each pair of a token
    and one before it. Back through frozen weights goes one pass more, for inputs alone. The oracle forms the products of
    queries and keys again. Gates take 2 for each weight of a head and each slot or token, three times that with gradient.
    """
    plan, layout = shapes.plan, shapes.layout
    width = layout.head_dim + layout.value_dim
    pairs = plan.tokens * (plan.tokens + 1) / 2 * layout.num_layers * layout.num_query_heads
    weights = parameters - layout.vocab_size * layout.hidden_size
    full = plan.rows * (2 * weights * plan.tokens + 2 * width * pairs)
    few = min(plan.budgets[1] + plan.period, plan.tokens) * plan.tokens * layout.num_layers * layout.num_query_heads
    bounded = plan.rows * (2 * weights * plan.tokens + 2 * width * few)
    oracle = plan.rows * 2 * layout.head_dim * pairs
    per_head = trained / max(layout.num_layers * layout.num_heads, 1)
    slots, tokens = shapes.states() * per_head, plan.rows * plan.tokens * trained
    making = {} if plan.stored_labels else {"labels": full + oracle}
    again = full if plan.recompute else 0.0
    return {
        "replay": {**making, "recorded run": bounded, "gates": 2 * (1 + 3) * slots},
        "stream": {"reading": full + oracle, "gates": 6 * tokens * (plan.cuts if shapes.at_cuts else 1)},
        "soft": {"teacher": full, "student, there and back": 2 * full + again, "gates": 6 * tokens},
        "probe": {"answers": full + oracle, "asking": full, "gates": 6.0 * trained * plan.rows * (plan.cuts + 1)},
        "grpo": {
            "traces": bounded,
            "full caches and blame": 2 * full / plan.group,
            "gates": 2 * (1 + 1 + 3) * slots,
        },
    }[plan.mode]


def report(figures: Figures, gpu_memory: str) -> str:
    """A table for people.

    Args:
        figures: of a run.
        gpu_memory: of one GPU, such as 80GiB.

    Raises:
        UsageError: no such memory.
    """
    plan, room = figures.plan, memory_of(gpu_memory)
    lines = [
        f"An estimate of mode {plan.mode}: {plan.rows} x {plan.tokens} tokens a process, {plan.processes} processes",
        "",
        *row("base, frozen, whole in every process", figures.base, f"{figures.parameters:,} weights"),
        *row("gates, gradients, AdamW: DDP", figures.gates["DDP"], f"{figures.gate_parameters:,} weights"),
        *(line for stage in STAGES[1:] for line in row(f"the same: {stage}", figures.gates[stage])),
    ]
    if plan.mode in ("replay", "stream"):
        lines += row("labels of a text, if they are stored", figures.stored, "float16, on a disk")
    for phase, parts in figures.phases.items():
        lines += [
            "",
            f"{phase}, at most at the same time",
            *(line for what in parts if parts[what] for line in row(what, parts[what])),
        ]
    lines += ["", *(line for stage in STAGES for line in row(f"a process at its peak: {stage}", figures.total(stage)))]
    step = sum(figures.operations.values()) * plan.processes
    lines += ["", *(f"  {what + ', per step':<44}{count:>12.3g} FLOP" for what, count in figures.operations.items())]
    lines += [f"  {f'all of it, in {plan.steps} steps of all processes':<44}{step * plan.steps:>12.3g} FLOP"]
    return "\n".join([*lines, "", fits(figures, room, gpu_memory)])


def row(what: str, count: int, note: str = "") -> list[str]:
    """A line of the table."""
    return [f"  {what:<44}{size(count):>12}  {note}".rstrip()]


def fits(figures: Figures, room: int, gpu_memory: str) -> str:
    """On how many GPUs of so many bytes the run fits, if each takes as many rows as it can hold."""
    plan, least = figures.plan, min(figures.gates, key=lambda stage: figures.gates[stage])
    fixed = figures.base + figures.gates[least]
    per_row = -(-figures.working // plan.rows)
    rows = max(room - fixed, 0) // max(per_row, 1)
    if rows == 0:
        short = size(fixed + per_row - room)
        return (
            f"Does not fit on GPUs of {gpu_memory}, however many: one row alone is {short} too much. Shorter texts, a longer "
            "period or smaller budgets take less."
        )
    unit = plan.group if plan.mode == "grpo" else 1
    if rows < unit:
        return f"Does not fit on GPUs of {gpu_memory}: a process needs a whole group of {unit} traces, and {rows} fit."
    whole, most = plan.rows * plan.processes, rows // unit * unit
    needed = -(-whole // most)
    fewer = ", on fewer with gradient accumulation" if needed > 1 else ""
    return (
        f"Fits on GPUs of {gpu_memory}, up to {most} rows on each ({least}): on {needed} for all {whole} rows of a step at "
        f"once{fewer}."
    )


def memory_of(text: str) -> int:
    """Bytes of a text such as 80GiB.

    Raises:
        UsageError: it is none.
    """
    budget = Budget.parse(text)
    if budget.unit != "bytes":
        raise UsageError(f"gpu_memory {text!r} is no memory; give 80GiB, for instance")
    return int(budget.amount)


def size(num_bytes: float) -> str:
    """Bytes for reading: 512 B, 640.0 KiB, 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
