"""Chats with facts: of the asked length, the same for the same seed, and nothing of others is replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from learnevict.errors import DataError
from recipes import facts


def test_chats_have_facts_and_the_asked_length(tmp_path: Path) -> None:
    prose = " ".join(f"Line {number} of a dull story goes on and on." for number in range(200))
    (tmp_path / "prose.jsonl").write_text(json.dumps({"text": prose}) + "\n")
    words = ["--data", str(tmp_path / "prose.jsonl"), "--fewest", "40", "--most", "60", "--chats", "5"]
    for name in ("one.jsonl", "two.jsonl"):
        facts.main(facts.parse([*words, "--out", str(tmp_path / name)]))
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    rows = [json.loads(line)["messages"] for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    told = [row[0]["content"] for row in rows]
    assert len(told) == 5 and all(row[0]["role"] == "user" for row in rows)
    assert all(40 <= len(text.split()) <= 60 + 10 + 8 * 14 for text in told)
    assert any(set(facts.LAST) & set(text.replace(".", " ").split()) for text in told)
    with pytest.raises(DataError, match="give more prose"):
        facts.main(
            facts.parse([*words[:-6], "--fewest", "5000", "--most", "6000", "--out", str(tmp_path / "three.jsonl")])
        )
    with pytest.raises(DataError, match=r"prose\.jsonl"):
        facts.main(facts.parse([*words, "--out", str(tmp_path / "prose.jsonl")]))
    (tmp_path / "odd.jsonl").write_text('{"text": "one\u2028line of prose"}\n\n{"words": "?"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 3 of .*odd\.jsonl' has no \"text\""):
        facts.main(facts.parse(["--data", str(tmp_path / "odd.jsonl"), "--out", str(tmp_path / "four.jsonl")]))
