"""What tests on SmolLM2 share. They run only when asked for with `-m real`: scripts/test_real fetches the model first."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from learnevict.infer.load import load


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if config.option.markexpr == "real" else True


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, opened by name."""
    assert "LEARNEVICT_CACHE" in os.environ, "scripts/test_real says where the model is"
    return load("smollm2", device="cpu")


@pytest.fixture
def eager(smollm2: tuple[Any, Any]) -> Iterator[Any]:
    """The model with attention written out, as the laws compare it."""
    model, _ = smollm2
    model.set_attn_implementation("eager")
    yield model
    model.set_attn_implementation("sdpa")


@pytest.fixture(scope="session")
def prose() -> str:
    """English that every Python brings: chapters of its language reference, some 6,000 tokens."""
    return "\n\n".join(topics[name] for name in ("assignment", "numbers", "exceptions", "naming"))


@pytest.fixture(scope="session")
def texts(prose: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a JSONL file of eight documents."""
    path, size = tmp_path_factory.mktemp("texts") / "prose.jsonl", len(prose) // 8
    rows = [json.dumps({"text": prose[place * size : (place + 1) * size]}) + "\n" for place in range(8)]
    path.write_text("".join(rows))
    return path
