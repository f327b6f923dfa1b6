"""A model ready to run: when its cache has evicted what a chat asks about before it read the question."""

from __future__ import annotations

from typing import Any

import pytest

from learnevict.cli.opened_model import OpenedModel
from learnevict.cli.options import EvictionOptions, When
from learnevict.cli.prompts import make_request
from tests.evals.tasks import byte_model

LONG, SHORT = "Day one was long. " * 8 + "How long?", "How long?"


@pytest.mark.parametrize(
    ("text", "chat", "options", "early"),
    [
        (LONG, True, {}, True),
        (LONG, False, {}, False),
        (SHORT, True, {}, False),
        (LONG, True, {"schedule": When.prefill_end}, False),
        (LONG, True, {"keep_prompt": True}, False),
    ],
)
def test_a_chat_may_be_compressed_before_it_is_read(text: str, chat: bool, options: Any, early: bool) -> None:
    bare = OpenedModel("bytes", byte_model.model(), byte_model.tokenizer())
    opened = bare.under(EvictionOptions(method="h2o", budget="40", slack=16, recent=8, **options))
    request = make_request(opened, {"prompt": text}, chat=chat)
    ((_, record),) = opened.answer([request], max_new_tokens=2)
    assert opened.begins_early(request, record) == early
