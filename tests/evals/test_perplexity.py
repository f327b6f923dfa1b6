"""Texts of unknown words are refused before anything is measured."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from learnevict.errors import DataError
from learnevict.evals.perplexity import check_known


def test_an_unknown_token_that_the_text_has_itself_is_no_unknown_word():
    """SmolLM2 has <|endoftext|> for both."""
    made = Tokenizer(WordLevel({"<|endoftext|>": 0, "one": 1, "two": 2}, unk_token="<|endoftext|>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<|endoftext|>")
    for text in ("one two", "one <|endoftext|> two"):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        check_known(tokenizer, ids, text)
        assert bool((ids == 0).any()) == ("end" in text)
    with pytest.raises(DataError, match="such as three; use another model"):
        check_known(tokenizer, torch.tensor([1, 0]), "one three")
