"""Bookkeeping cases as a task: what is checked, how long they are, and what counts as right."""

from __future__ import annotations

import pytest

from learnevict import testbed
from learnevict.errors import UsageError
from learnevict.evals.tasks.bookkeeping import BookkeepingTask
from learnevict.testbed import entries


@pytest.mark.parametrize("family", entries.FAMILIES)
def test_checked_tokens_are_those_of_the_checked_places(family: str):
    tokenizer = testbed.build_tokenizer()  # reads other words as unknown, but knows where each lies
    task = BookkeepingTask(family, tokenizer)
    cases = task.samples([0, 1, 2])
    batch = task.reference(tokenizer, cases)
    for row, case in enumerate(cases):
        response = tokenizer(case.response, return_offsets_mapping=True)
        ids = response["input_ids"]
        assert batch.input_ids[row, -len(ids) :].tolist() == ids
        assert (
            int(batch.loss_mask[row].sum())
            == len(ids)
            == int(batch.attention_mask[row].sum()) - batch.prompt_length[row]
        )
        found = batch.answer_mask[row, -len(ids) :].tolist()
        words = [case.response[start:stop] for start, stop in response["offset_mapping"]]
        marked = [word for word, mark in zip(words, found, strict=True) if mark]
        assert [word.rstrip(".,:") for word in marked] == [case.response[a:b].strip() for a, b in case.checked]
        assert task.score(case, f"So. {case.response} And so on.") == 1
        assert task.score(case, case.response.replace("Answer", "Result")) == 0
    both, answers = task.mean_length(), task.mean_length(prompt=False)
    assert 0 < answers < both


def test_a_model_without_chats_is_refused():
    tokenizer = testbed.build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="chat template"):
        BookkeepingTask("accounts", tokenizer)
