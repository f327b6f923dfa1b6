"""Requests: one prompt, one testbed task, or the rows of a file, checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learnevict.errors import DataError, LearnevictError, UsageError
from learnevict.infer.prompts import CHATS, as_messages, checked, parse_row, read_lines, warn_of_tools

if TYPE_CHECKING:
    from learnevict.cli.opened_model import OpenedModel

FORMS = '{"prompt": TEXT}, {"messages": [{"role": ..., "content": ...}]} or {"task": FAMILY, "seed": N}'


@dataclass(frozen=True)
class Row:
    """A line of a batch file: its content, or what is wrong with it."""

    line: int
    name: str
    content: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class Request:
    """Token ids to read. `sample` is the testbed task they come from; `key` tells rows and settings apart for a resume; `chat`:
    they end with what a user asks."""

    name: str
    ids: list[int]
    sample: Any = None
    key: str = ""
    chat: bool = False

    def checked(self, text: str) -> dict[str, Any]:
        """Returns whether a task was answered right, and what was expected; nothing for a free prompt."""
        if self.sample is None:
            return {}
        from learnevict.testbed import verify

        named = {"task": self.sample.family, "seed": self.sample.seed}
        return {**named, "correct": verify(self.sample, text), "expected": self.sample.answer}


def make_request(
    opened: OpenedModel, content: dict[str, Any], *, chat: bool = False, name: str = "", key: str = ""
) -> Request:
    """Turns one row into token ids.

    Raises:
        DataError: empty, or of no known form.
        UsageError: words or a task that the model does not know; no chat template.
    """
    from learnevict.infer.generate import read_chat, read_text

    forms = [form for form in ("prompt", "task", *CHATS) if form in content]
    if len(forms) != 1:
        raise DataError(f"a row needs exactly one of prompt, {', '.join(CHATS)} and task, as in {FORMS}")
    given = content[forms[0]]
    if forms == ["task"]:
        from learnevict import testbed

        if not opened.speaks_testbed:
            raise UsageError(
                f"model {opened.name!r} does not know the testbed's words; use --model testbed, or give a prompt"
            )
        seed = content.get("seed", 0)
        if not isinstance(seed, int):
            raise DataError(f"seed must be a whole number, not {seed!r}")
        sample = testbed.generate(str(given), seed)
        return Request(name, read_text(opened.tokenizer, sample.prompt), sample, key)
    if forms == ["prompt"] and not isinstance(given, str | list):
        raise DataError(f"prompt must be text, not {type(given).__name__}")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else as_messages(given)
    for message in messages:
        check_words(opened, message["content"])
    # The testbed was only ever shown chats: a bare prompt becomes a user's turn.
    bare = isinstance(given, str) and bool(given.strip()) and not given.lstrip().startswith("<bos>")
    if not isinstance(given, str) or chat or (bare and opened.speaks_testbed):
        warn_of_tools(messages, opened.tokenizer)
        return Request(name, read_chat(opened.tokenizer, messages), None, key, chat=not opened.speaks_testbed)
    return Request(name, read_text(opened.tokenizer, given), None, key)


def check_words(opened: OpenedModel, text: str) -> None:
    """Warns of words that the tokenizer reads as <unk>.

    Raises:
        DataError: half of a character.
        UsageError: the model is the testbed's, which is to know every word.
    """
    checked(text, "the prompt ")
    if opened.speaks_testbed:
        from learnevict.testbed import unknown_words

        if unknown := unknown_words(text):
            shown = ", ".join(repr(word) for word in unknown[:6]) + (", ..." if len(unknown) > 6 else "")
            raise UsageError(
                f"the testbed does not know {shown}: it reads its own small language only; try --task program, or "
                "another --model"
            )
        return
    unknown, unknown_id = opened.tokenizer.unk_token, opened.tokenizer.unk_token_id
    written = unknown_id is None or unknown in text  # some models write it themselves, as in <|endoftext|>
    if not written and unknown_id in opened.tokenizer(text, add_special_tokens=False).input_ids:
        warnings.warn("parts of the prompt are unknown to this model's tokenizer and are read as <unk>", stacklevel=2)


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a JSONL file, broken ones with their problem; empty lines are passed over.

    A row's name is its id, or the number of its line.

    Raises:
        DataError: no such file, or no rows in it.
    """
    rows: list[Row] = []
    used: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        name, content, problem = f"line {number}", {}, ""
        try:
            content = parse_row(line)
            name = checked(str(content.get("id", number)))
        except DataError as error:
            problem = f"{error}; a row is an object such as {FORMS}"
        if name in used:
            problem = f"id {name!r} was taken by line {used[name]}; ids must differ"
        used.setdefault(name, number)
        rows.append(Row(number, name, content, problem))
    if not rows:
        raise DataError(f"{str(path)!r} has no rows; give a JSONL file with rows such as {FORMS}")
    return rows


def make_requests(
    opened: OpenedModel, rows: list[Row], settings: dict[str, Any], *, chat: bool
) -> tuple[list[Request], list[str]]:
    """Returns requests of the good rows, whose keys hash everything that an answer depends on, and a line on each bad row."""
    good: list[Request] = []
    bad: list[str] = []
    for row in rows:
        try:
            if row.problem:
                raise DataError(row.problem)
            key = hashlib.sha256(json.dumps([row.content, settings], sort_keys=True).encode()).hexdigest()[:16]
            good.append(make_request(opened, row.content, chat=chat, name=row.name, key=key))
        except LearnevictError as error:  # noqa: PERF203
            bad.append(f"line {row.line}: {' '.join(str(error).split())}")
        except RecursionError:  # read, but not to be written again for the key
            bad.append(f"line {row.line}: brackets are nested too deeply")
    return good, bad


def weight_hashes(model: Any, policy: Any) -> dict[str, Any]:
    """Returns hashes of the weights that answers depend on: a folder may hold others tomorrow.

    Args:
        model: the base.
        policy: of its cache, with or without gates in its parts; None: a full cache.
    """
    from learnevict.hub import weight_hash

    return {"base": weight_hash(model), "gates": [_hash(part) for part in _gates_in(policy)]}


def _gates_in(part: Any) -> Iterator[Any]:
    """Yields the torch modules in a policy, wherever its parts keep them."""
    from torch.nn import Module

    if isinstance(part, Module):
        yield part
    elif is_dataclass(part):
        for one in fields(part):
            yield from _gates_in(getattr(part, one.name))


def _hash(module: Any) -> str:
    """Returns a short hash of all values of a module; gates are small."""
    from torch import uint8

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
