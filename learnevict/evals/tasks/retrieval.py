"""Retrieval in long prose as a task: each question is asked with the context, and after it was read and compressed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from learnevict.evals.tasks.contexts import Context, Haystack, Question, make
from learnevict.evals.tasks.questions import ask, foreseen
from learnevict.policy import AnyPolicy

MODES = ("after", "known")


@dataclass(frozen=True)
class RetrievalTask:
    """One kind of retrieval at one length, asked with the question known while the context is read, and afterwards.

    Attributes:
        kind: one of KINDS.
        tokens: size of a context.
        haystack: the prose.
        source: what to call the haystack, for the log.
        chat: ask under the model's chat template.
        depth: see `make`.
        max_new_tokens: the longest reply.
        modes: how questions are asked.
    """

    kind: str
    tokens: int
    haystack: Haystack
    source: str
    chat: bool = True
    depth: float | None = None
    max_new_tokens: int = 24
    modes: tuple[str, ...] = MODES

    @property
    def name(self) -> str:
        """Returns the kind and the length, such as "needle@1000"."""
        return f"{self.kind}@{self.tokens}" + ("" if self.depth is None else f"@{self.depth:g}")

    @property
    def origin(self) -> dict[str, Any]:
        """See Task."""
        return {"tasks": "retrieval 1", "haystack": self.source, "chat": self.chat, "limit": self.max_new_tokens}

    def mean_length(self, *, prompt: bool = True) -> float:
        """Returns the size of a context: it is what is compressed."""
        return self.tokens

    def samples(self, seeds: Sequence[int]) -> list[Context]:
        """See Task."""
        return [make(self.kind, seed, self.haystack, self.tokens, self.depth) for seed in seeds]

    def measure(
        self, mode: str, model: Any, tokenizer: Any, samples: Sequence[Context], policy: AnyPolicy | None
    ) -> dict[str, Any]:
        """Returns columns of the log: `exact` and `found`, shares of a context's questions and of their answers, `tokens`
        generated, `depth` of the first question's fact (-1: none), `seconds` and bytes."""
        asked, questions, each = self._asked(samples)
        start = time.perf_counter()
        replies = ask(
            model, tokenizer, policy, asked, each=each, chat=self.chat, known=mode == "known",
            max_new_tokens=self.max_new_tokens,
        )  # fmt: skip
        seconds = (time.perf_counter() - start) / len(samples)
        scores = [question.score(text) for question, text in zip(questions, replies.texts, strict=True)]
        starts = range(0, len(questions), each)
        return {
            "exact": [sum(score == 1 for score in scores[i : i + each]) / each for i in starts],
            "found": [round(sum(scores[i : i + each]) / each, 6) for i in starts],
            "tokens": [sum(replies.tokens[i : i + each]) for i in starts],
            "depth": [-1 if questions[i].depth is None else round(questions[i].depth or 0.0, 4) for i in starts],
            "seconds": round(seconds, 4),
            **replies.held,
        }

    def future(
        self, mode: str, model: Any, tokenizer: Any, samples: Sequence[Context], block: int
    ) -> Float[Tensor, "L B H T 1"]:
        """Returns what questions and right answers attend to, see `foreseen`: golden knows all questions of a context."""
        asked, questions, each = self._asked(samples)
        replies = [", ".join(question.answers) for question in questions]
        return foreseen(model, tokenizer, asked, replies, each=each, chat=self.chat, known=mode == "known")

    def _asked(self, samples: Sequence[Context]) -> tuple[list[tuple[str, str]], list[Question], int]:
        """Returns (context, question) pairs, the questions, and how many each context has."""
        both = [(sample.text, question) for sample in samples for question in sample.questions]
        return [(text, one.text) for text, one in both], [one for _, one in both], len(samples[0].questions)
