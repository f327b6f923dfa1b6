"""Defaults follow the texts; those for the testbed, and whatever is given, stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from learnevict import testbed
from learnevict.train.run.fitting import fit

TOKENIZER = testbed.build_tokenizer()
WORDS = [word for word in TOKENIZER.get_vocab() if not word.startswith("<")]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Eight texts of 700 tokens and one of 1500."""
    sizes = [1500] + [700] * 8
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join((WORDS * 9)[:size])}) for size in sizes))
    return path


def fitted(distill: Any, *words: str, positions: int = 2048) -> Any:
    flags = distill.parse(list(words))
    flags.lengths = fit(flags, Qwen3Config(max_position_embeddings=positions), TOKENIZER)
    return flags


@pytest.mark.parametrize(
    ("method", "budgets"), [("foresightkv", (72, 320)), ("kvzap", (72, 320)), ("trimkv", (24, 64)), ("judge_q", None)]
)
def test_defaults_follow_the_texts(method, budgets, distill, texts, capsys):
    flags = fitted(distill, method, "--data", str(texts))
    assert (flags.lengths.median, flags.lengths.longest) == (700, 1500)
    assert flags.common.period == 32 == getattr(flags.mode, "period", 32) == (flags.settings.get("period") or 32)
    assert getattr(flags.mode, "budgets", None) == budgets
    assert flags.common.eval_budgets == ["25%"]
    assert "texts of 700 tokens (the median of 9): period 32" in capsys.readouterr().out


def test_what_is_given_holds(distill, texts):
    words = ["kvzap", "--data", str(texts), "--period", "128", "--eval_budgets", "50%"]
    flags = fitted(distill, *words)
    assert (flags.mode.period, flags.mode.budgets, flags.common.eval_budgets) == (128, (133, 320), ["50%"])
    flags = fitted(distill, *words, "--budgets", "200", "300", "--max_length", "90")
    assert (flags.mode.budgets, flags.common.max_length, flags.lengths.longest) == ((200, 300), 90, 90)


def test_texts_are_no_longer_than_the_model_has_positions_for(distill, texts):
    assert fitted(distill, "kvzap", "--data", str(texts), positions=600).lengths.longest == 600
    repeated = fitted(
        distill, "kvzap", "--data", str(texts), "--target", "reconstruction", "--chunk", "200", positions=600
    )
    assert repeated.lengths.longest == 336


def test_the_testbed_stays_what_it_is(distill, capsys):
    plain, flags = distill.parse(["kvzap"]), fitted(distill, "kvzap")
    assert flags.lengths is None and vars(flags.common) == vars(plain.common) and flags.mode == plain.mode
    assert (plain.mode.period, plain.mode.budgets, plain.common.eval_budgets) == (16, (36, 160), ["64"])
    assert not capsys.readouterr().out
