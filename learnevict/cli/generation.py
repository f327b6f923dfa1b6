"""Answers under the chosen policy, and what is said about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from learnevict.cli.policy_choice import OpenedModel, PolicyChoice, choose_method, choose_policy
from learnevict.cli.prompts import Request
from learnevict.config import Budget
from learnevict.errors import UsageError


@dataclass(frozen=True)
class GeneratedAnswer:
    """A completion with what it was asked for; `about` is what a second, golden run adds."""

    request: Request
    completion: Any
    about: dict[str, Any]


class Generator:
    """Answers requests, all under the same policy and sampling.

    Args:
        opened: the model.
        choice: what the user said about eviction.
        sampling: max_new_tokens and temperature; `seed` comes with each call.
        record: completions carry their eviction trace.

    Raises:
        LearnevictError: the choice makes no sense for this model.
    """

    def __init__(
        self, opened: OpenedModel, choice: PolicyChoice, sampling: dict[str, Any], *, record: bool = False
    ) -> None:
        self.opened, self.choice, self.sampling = opened, choice, {**sampling, "record": record}
        self.golden = choice.method == "golden" and choice.checkpoint is None
        self.policy = None if self.golden else choose_policy(choice, opened)
        if self.golden:
            golden_budget(choice, opened)

    @property
    def method(self) -> str:
        """What to call it."""
        if self.golden:
            return "golden"
        return "full" if self.policy is None else self.policy.name

    def __call__(self, requests: list[Request], *, seed: int, streamer: Any = None) -> list[GeneratedAnswer]:
        """GeneratedAnswer requests together, as one batch."""
        if self.golden:
            return self._twice(requests, seed, streamer)
        found = self._generate(self.policy, requests, seed, streamer)
        return [GeneratedAnswer(request, one, {}) for request, one in zip(requests, found, strict=True)]

    def _generate(self, policy: Any, requests: list[Request], seed: int, streamer: Any) -> list[Any]:
        from learnevict.infer.generate import generate

        opened = self.opened
        return generate(
            opened.model, opened.tokenizer, policy, [request.ids for request in requests], batch_size=len(requests),
            streamer=streamer, seed=seed, **self.sampling,
        )  # fmt: skip

    def _twice(self, requests: list[Request], seed: int, streamer: Any) -> list[GeneratedAnswer]:
        """A full-cache run, golden labels of its text, and a second run under their trace."""
        from learnevict.evals.generation import agreement, padded

        first = self._generate(None, requests, seed, None)
        ids, mask = padded(first, self.opened.tokenizer.pad_token_id or 0)
        policy = golden_policy(self.opened, self.choice, ids, mask, [len(request.ids) for request in requests])
        second = self._generate(policy, requests, seed, streamer)
        return [
            GeneratedAnswer(request, after, {"runs": 2, "agreement": round(agreement(before.tokens, after.tokens), 4)})
            for request, before, after in zip(requests, first, second, strict=True)
        ]

    def record(self, answer: GeneratedAnswer) -> dict[str, Any]:
        """The row of figures that --json and --batch write."""
        one, flat = answer.completion, [count for layer in answer.completion.kept for count in layer]
        return {
            "id": answer.request.name,
            "text": one.text,
            "finished": one.finished,
            **answer.request.verdict(self.opened, one.tokens),
            **answer.about,
            "model": self.opened.name,
            "method": self.method,
            "budget": self.choice.budget,
            "budget_tokens": one.budget,
            "prompt_tokens": len(one.prompt),
            "tokens_generated": len(one.tokens),
            "tokens_per_second": round(one.tokens_per_second, 2),
            "prompt_seconds": round(one.prompt_seconds, 4),
            "kept": {"mean": round(sum(flat) / len(flat), 2), "min": min(flat), "max": max(flat)},
            "kv_bytes_end": one.kv_bytes,
            "kv_bytes_peak": one.kv_bytes_peak,
            "kv_bytes_full": one.kv_bytes_full,
        }


def golden_budget(choice: PolicyChoice, opened: OpenedModel) -> int:
    """The budget of a golden trace, in tokens.

    Raises:
        UsageError: none, or a share or bytes.
    """
    choose_method(choice, opened)
    budget = Budget.parse(choice.budget or "")
    if budget.unit != "tokens":
        raise UsageError("golden is rolled for one budget in tokens; give --budget 64 rather than a share or bytes")
    return int(budget.amount)


def golden_policy(opened: OpenedModel, choice: PolicyChoice, ids: Any, mask: Any, prompts: list[int]) -> Any:
    """The policy that follows the golden trace of a text the model has seen in full.

    Args:
        opened: the model.
        choice: what the user said.
        ids: int64 [B, T], prompts and answers as generation laid them out.
        mask: [B, T], 0 = padding.
        prompts: real tokens of each prompt.
    """
    import torch

    from learnevict.methods import golden
    from learnevict.oracle.collect import golden_trace
    from learnevict.policy import Guard

    options: dict[str, Any] = {"slack": 128, **choice.options(opened)}
    guard = Guard(**{name: options[name] for name in ("sinks", "recent", "prompt") if name in options})
    budget, block = golden_budget(choice, opened), max(options["slack"], 1)
    ids, mask = ids.to(opened.model.device), mask.to(opened.model.device)
    length = torch.tensor(prompts)
    trace = golden_trace(opened.model, ids, mask, budget=budget, block=block, guard=guard, prompt_length=length)
    return golden.policy(budget, trace=trace, text=ids, **options)


def figures(record: dict[str, Any], device: str) -> list[str]:
    """The lines under an answer."""
    kept, read = record["kept"], record["prompt_tokens"] + record["tokens_generated"] - 1
    spread = "" if kept["min"] == kept["max"] else f" ({kept['min']} to {kept['max']})"
    asked = record["budget"] if str(record["budget"]) == str(record["budget_tokens"]) else None
    budget = "" if record["budget"] is None else f", budget {record['budget_tokens']}"
    budget += "" if asked or record["budget"] is None else f" = {record['budget']}"
    now, peak, full = (size(record[f"kv_bytes_{name}"]) for name in ("end", "peak", "full"))
    share = record["kv_bytes_peak"] / max(record["kv_bytes_full"], 1)
    lines = [
        f"{record['method']} on {record['model']} ({device}): {record['tokens_generated']} new tokens, "
        f"{record['tokens_per_second']:.1f} tokens/s, {record['prompt_tokens']} prompt tokens in "
        f"{record['prompt_seconds']:.2f} s" + ("" if record["finished"] else "; cut at --max-new-tokens"),
        f"kept per head: {kept['mean']:g}{spread} of {read} tokens{budget}",
        f"keys and values: now {now}, peak {peak}, full cache {full} (peak is {share:.0%} of it)",
    ]
    if "runs" in record:
        same = (
            "the same text"
            if record["agreement"] == 1
            else f"the same text for {record['agreement']:.0%}, then recency"
        )
        lines.append(f"golden ran twice: a full cache for the labels, then under their trace; {same}")
    if "correct" in record:
        lines.append(f"answer: {'right' if record['correct'] else 'wrong'}, expected: {record['expected']}")
    return lines


def size(num_bytes: float) -> str:
    """Bytes for reading: 512 B, 640.0 KiB, 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
