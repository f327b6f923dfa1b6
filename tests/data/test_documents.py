"""Documents: from files, folders and chats; packed or one by one; streamed, stopped anywhere and gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from learnevict import testbed
from learnevict.cli.prompts import read_rows
from learnevict.data import documents as data
from learnevict.data.documents import Collator, Encoder, long_enough, read_documents
from learnevict.data.label_store import Document
from learnevict.data.opening import read_for_learning, read_source
from learnevict.data.sources import Source
from learnevict.data.stream import Stream
from learnevict.errors import DataError, LearnevictWarning, UsageError
from learnevict.testbed import families_of

TOKENIZER = testbed.build_tokenizer()
WORDS = [word for word in TOKENIZER.get_vocab() if not word.startswith("<")]


def text(number: int, length: int = 5) -> str:
    return " ".join(WORDS[(7 * number + i) % len(WORDS)] for i in range(length))


def ids(said: str) -> list[int]:
    return TOKENIZER(said, add_special_tokens=False)["input_ids"]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text(i)}) for i in range(9)))
    return path


def test_the_first_documents_are_held_out(jsonl):
    learn, held_out = read_documents(Source(str(jsonl)), TOKENIZER, 4, skip=2)
    assert [one.input_ids for one in held_out] == [ids(text(i)) for i in range(2)]
    assert [one.input_ids for one in learn] == [ids(text(i)) for i in range(2, 6)]
    with pytest.raises(DataError, match="only 9 documents, and 9 are held out"):
        read_documents(Source(str(jsonl)), TOKENIZER, 4, skip=9)


def test_every_kind_of_local_source_reads_the_same(tmp_path, jsonl):
    import datasets

    table = datasets.Dataset.from_list([{"text": text(i)} for i in range(9)])
    (tmp_path / "files").mkdir()
    table.select(range(5)).to_parquet(tmp_path / "files" / "a.parquet")
    table.select(range(5, 9)).to_parquet(tmp_path / "files" / "b.parquet")
    table.to_parquet(tmp_path / "one.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "other": table.select([0])}).save_to_disk(str(tmp_path / "splits"))
    expected = [one.input_ids for one in read_documents(Source(str(jsonl)), TOKENIZER, 99)[0]]
    for name in ("files", "one.parquet", "saved", "splits"):
        found = read_documents(Source(str(tmp_path / name)), TOKENIZER, 99)[0]
        assert [one.input_ids for one in found] == expected, name
    assert len(read_documents(Source(str(tmp_path / "splits"), split="other"), TOKENIZER, 99)[0]) == 1
    with pytest.raises(DataError, match="has no split 'nope'; it has train, other"):
        read_documents(Source(str(tmp_path / "splits"), split="nope"), TOKENIZER, 99)
    for name, more in (("saved", {"split": "nope"}), ("files", {"split": "nope"}), ("one.parquet", {"config": "nope"})):
        with pytest.raises(DataError, match=r"no .*'nope'; leave"):
            read_documents(Source(str(tmp_path / name), **more), TOKENIZER, 99)


def test_hidden_files_of_a_folder_are_not_read(tmp_path):
    for name in ("a.txt", ".b.txt", "._a.txt", ".git/c.txt", "more/.d.jsonl", "more/e.txt"):
        (tmp_path / ".home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".home" / name).write_text(text(0))
    found, _ = read_documents(Source(str(tmp_path / ".home")), TOKENIZER, 9)
    assert [one.input_ids for one in found] == [ids(text(0))] * 2


def test_what_cannot_be_read_is_told_and_never_downloaded(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("a")
    (tmp_path / "mixed" / "b.jsonl").write_text("{}")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for name, message in (
        ("nowhere.parquet", "there is no such file or folder"),
        ("./nowhere", "there is no such file or folder"),
        ("nowhere.txt", "cannot read"),
        (str(tmp_path / "empty"), "found none of these"),
        (str(tmp_path / "mixed"), "found files of 2 formats"),
        (str(tmp_path / "bad.parquet"), "cannot read"),
    ):
        with pytest.raises(DataError, match=message):
            read_documents(Source(name), TOKENIZER, 9)


def test_a_prompt_is_everything_before_the_last_answer():
    chat = [
        {"role": "user", "content": text(0)},
        {"role": "assistant", "content": text(1)},
        {"role": "user", "content": text(2)},
        {"role": "assistant", "content": text(3)},
        {"role": "user", "content": text(4)},
    ]
    found, prompt = Encoder(TOKENIZER).encode({"messages": chat}, "here")
    assert found == ids(TOKENIZER.apply_chat_template(chat[:4], tokenize=False))
    assert found[:prompt] == ids(TOKENIZER.apply_chat_template(chat[:3], tokenize=False, add_generation_prompt=True))
    assert found[prompt : prompt + 5] == ids(text(3))
    assert Encoder(TOKENIZER, column="turns").encode({"turns": chat}, "here") == (found, prompt)
    asked, prompt = Encoder(TOKENIZER).encode({"messages": chat[:1]}, "here")
    assert asked == ids(TOKENIZER.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True))
    assert prompt == len(asked), "it ends where the answer would begin"


def test_prompt_and_completion_columns():
    row = {"prompt": text(0), "completion": text(1)}
    assert Encoder(TOKENIZER).encode(row, "here") == (ids(text(0)) + ids(text(1)), 5)
    turns = {
        "prompt": [{"role": "user", "content": text(0)}],
        "completion": [{"role": "assistant", "content": text(1)}],
    }
    chat = {"messages": [*turns["prompt"], *turns["completion"]]}
    assert Encoder(TOKENIZER).encode(turns, "here") == Encoder(TOKENIZER).encode(chat, "here")


def test_a_prompt_may_be_all_there_is():
    assert Encoder(TOKENIZER).encode({"prompt": text(0)}, "here") == (ids(text(0)), 5)
    turns = [{"role": role, "content": text(i)} for i, role in enumerate(("user", "assistant", "user"))]
    wanted = ids(TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    assert Encoder(TOKENIZER).encode({"prompt": turns}, "here") == (wanted, len(wanted))
    assert Encoder(TOKENIZER, column="body").encode({"prompt": "a", "body": text(0)}, "here") == (ids(text(0)), 0)
    with pytest.raises(DataError, match="has no text"):
        Encoder(TOKENIZER).encode({"prompt": turns, "completion": text(0)}, "here")


def test_a_row_without_text_names_its_columns():
    with pytest.raises(DataError, match=r"row 3 has no text.*its columns are body, n; name one with --column"):
        Encoder(TOKENIZER).encode({"body": "a", "n": 1}, "row 3")
    assert Encoder(TOKENIZER, column="body").encode({"body": text(0)}, "row 3") == (ids(text(0)), 0)
    plain = testbed.build_tokenizer()
    plain.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        Encoder(plain).encode({"messages": [{"role": "user", "content": "a"}]}, "row 3")


def test_packing_joins_and_cuts(jsonl):
    source = Source(str(jsonl), max_length=8, packed=True)
    with pytest.warns(LearnevictWarning, match="the last 6 tokens fill no piece"):
        found = read_documents(source, TOKENIZER, 99)[0]
    joined = [token for i in range(9) for token in [*ids(text(i)), TOKENIZER.eos_token_id]]
    assert [one.input_ids for one in found] == [joined[i : i + 8] for i in range(0, len(joined) - 7, 8)]
    with pytest.raises(DataError, match="no text of 999 tokens"):
        read_documents(Source(str(jsonl), max_length=999, packed=True), TOKENIZER, 9)


def test_long_texts_become_pieces_and_what_is_cut_off_is_said(tmp_path):
    rows = [{"text": text(0, 11)}, {"prompt": text(1), "completion": text(2)}, {"prompt": text(3, 6)}]
    source = replace(write_lines(tmp_path / "a.jsonl", rows), max_length=4)
    with pytest.warns(
        LearnevictWarning, match="8 tokens of chats, or of prompts .* lie beyond --max_length 4: left out"
    ):
        found, _ = read_documents(source, TOKENIZER, 9)
    whole = ids(text(0, 11))
    pieces = [(whole[:4], 0), (whole[4:8], 0), (whole[8:], 0), (ids(text(1))[:4], 4), (ids(text(3))[:4], 4)]
    assert [(one.input_ids, one.prompt_length) for one in found] == pieces
    with pytest.warns(LearnevictWarning, match="cut off at 4 tokens, such as row 2") as told:
        streamed = [one.input_ids for one in islice(Stream(source, TOKENIZER), 10)]
    assert streamed == [piece for piece, _ in pieces] * 2 and len(told) == 1
    packed = replace(source, packed=True, max_length=20)
    with pytest.warns(LearnevictWarning, match="the last 10 tokens fill no piece of --max_length 20: left out"):
        assert len(read_documents(packed, TOKENIZER, 9)[0]) == 1
    with pytest.warns(LearnevictWarning, match="2 of 3 texts, 5 of 11 tokens, have fewer than 4: left out"):
        kept = long_enough([Document([0] * size, 0, "", 0) for size in (2, 3, 6)], 4)
    assert [len(one.input_ids) for one in kept] == [6]


@pytest.mark.slow
@pytest.mark.parametrize(("packed", "size"), [(False, 99), (False, 3), (True, 4)])
def test_a_stream_goes_on_exactly_where_it_was(jsonl, packed, size):
    source = Source(str(jsonl), max_length=size, packed=packed, streaming=True)
    whole = list(islice(Stream(source, TOKENIZER, skip=2), 30))
    assert [one.input_ids for one in whole[:3]] == [one.input_ids for one in read_documents(source, TOKENIZER, 3, 2)[0]]
    for stop in (0, 1, 6, 7, 13, 20):
        first = Stream(source, TOKENIZER, skip=2)
        begun = list(islice(first, stop))
        state = json.loads(json.dumps(first.state_dict()))
        second = Stream(source, TOKENIZER, skip=2)
        second.load_state_dict(state)
        rest = list(islice(second, 30 - stop))
        assert begun + rest == whole, stop
        assert len(second.digest) == 64


# --- what strangers' files are like ---

BAD = [
    {"text": None},
    {"text": ""},
    {"text": " \n"},
    {"body": "a"},
    {"messages": []},
    {"messages": [{"role": "user"}]},
    {},
]
BAD_LINES = [
    "null",
    "[]",
    "{]",
    '{"text": "caf\udce9"}',
    '{"text": "half of it',
    '{"text": "\\ud800"}',
    '{"text": ' + "[" * 100_000,
]


def write_lines(path: Path, rows: list[Any], encoding: str = "utf-8") -> Source:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding=encoding, errors="surrogateescape")  # "\udce9" is the byte 0xe9
    return Source(str(path))


def test_bad_rows_are_left_out_counted_and_told_of_once(tmp_path):
    import datasets

    good = [{"text": text(0)}, {"text": text(1)}]
    wanted = [ids(text(0)), ids(text(1))]
    for bad in [*BAD, *BAD_LINES]:
        source = write_lines(tmp_path / "a.jsonl", [good[0], bad, "", bad, good[1]])
        with pytest.warns(
            LearnevictWarning, match=r"2 of 4 rows cannot be read: left out; the first: row 2 of "
        ) as told:
            assert [one.input_ids for one in read_documents(source, TOKENIZER, 9)[0]] == wanted, bad
        assert len(told) == 1
        stream = Stream(source, TOKENIZER)
        with pytest.warns(LearnevictWarning, match="left out, such as this: row 2 of ") as told:
            assert [one.input_ids for one in islice(stream, 4)] == wanted * 2, bad
        assert (len(told), stream.num_bad) == (1, 4)
        with pytest.raises(DataError, match=r"row 1 of .* \(and 1 others like it\)"):
            read_documents(write_lines(tmp_path / "b.jsonl", [bad, bad]), TOKENIZER, 9)
        with pytest.raises(DataError, match="row 1 of "):
            next(iter(Stream(Source(str(tmp_path / "b.jsonl")), TOKENIZER)))
    datasets.Dataset.from_list([good[0], {"text": None}, good[1]]).to_parquet(tmp_path / "a.parquet")
    with pytest.warns(LearnevictWarning, match="1 of 3 rows"):
        assert len(read_documents(Source(str(tmp_path / "a.parquet")), TOKENIZER, 9)[0]) == 2


def test_a_stream_that_was_stopped_behind_its_good_rows_goes_on(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"text": text(0)}, {"text": text(1)}, {"text": None}])
    first = Stream(source, TOKENIZER)
    assert len(list(islice(first, 2))) == 2
    second = Stream(source, TOKENIZER)
    second.load_state_dict(first.state_dict())
    with pytest.warns(LearnevictWarning, match="row 3"):
        assert next(iter(second)).input_ids == ids(text(0))


def test_a_source_of_bad_rows_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(data, "open_rows", lambda _: ({"body": "a"} for _ in iter(int, 1)))
    with pytest.raises(DataError, match=r"its columns are body; name one with --column \(and 999 others"):
        read_documents(Source("endless"), TOKENIZER, 9)


def test_all_readers_take_the_same_files(tmp_path):
    said = [f"{text(0)}\u2028{text(1)}", f"{text(2)}\u0085", text(3)]
    rows = [{"text": one, "prompt": one, "id": str(number)} for number, one in enumerate(said)]
    (tmp_path / "folder").mkdir()
    sources = [
        write_lines(tmp_path / "bom.jsonl", rows, "utf-8-sig"),
        write_lines(tmp_path / "UP.JSONL", rows),
        write_lines(tmp_path / "lines.json", rows),
        write_lines(tmp_path / "folder" / "a.Jsonl", rows, "utf-8-sig"),
    ]
    (tmp_path / "crlf.jsonl").write_bytes((tmp_path / "UP.JSONL").read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "array.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    sources += [Source(str(tmp_path / "crlf.jsonl")), Source(str(tmp_path / "array.json"))]
    sources[3] = Source(str(tmp_path / "folder"))
    for source in sources:
        wanted = [ids(one) for one in said]
        assert [one.input_ids for one in read_documents(source, TOKENIZER, 9)[0]] == wanted, source
        assert [one.input_ids for one in islice(Stream(source, TOKENIZER), 3)] == wanted, source
        path = Path(source.name)
        if path.is_file() and path.name != "array.json":
            assert [row.content for row in read_rows(path)] == rows, source
    (tmp_path / "bom.TXT").write_text(text(0), encoding="utf-8-sig")
    for name in ("bom.TXT", str(tmp_path / "bom.TXT")):
        path = tmp_path / name
        assert read_documents(Source(str(path)), TOKENIZER, 9)[0][0].input_ids == ids(text(0))


def test_a_file_that_cannot_be_read_is_one_bad_row_of_its_folder(tmp_path):
    for kind, good, bad in (("txt", text(0), "caf\udce9"), ("json", json.dumps([{"text": text(0)}]), "[{]")):
        for name, said in (("a", good), ("b", bad), ("c", good)):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{name}.{kind}").write_text(said, encoding="utf-8", errors="surrogateescape")
        source = Source(str(tmp_path / kind))
        with pytest.warns(LearnevictWarning, match=rf"1 of 3 rows .*the first: .*b\.{kind}' is not "):
            assert [one.input_ids for one in read_documents(source, TOKENIZER, 9)[0]] == [ids(text(0))] * 2
        with pytest.warns(LearnevictWarning, match=rf"b\.{kind}' is not "):
            assert len(list(islice(Stream(source, TOKENIZER), 4))) == 4
        with pytest.raises(DataError, match=rf"^'.*b\.{kind}' is not "):
            read_documents(Source(str(tmp_path / kind / f"b.{kind}")), TOKENIZER, 9)


def test_conversations_of_all_shapes_are_one():
    chat = [("user", text(0)), ("assistant", text(1)), ("user", text(2)), ("assistant", text(3))]
    wanted = Encoder(TOKENIZER).encode({"messages": [{"role": a, "content": b} for a, b in chat]}, "here")
    old = {"user": "human", "assistant": "gpt"}
    for row in (
        {"conversations": [{"from": old[a], "value": b} for a, b in chat]},
        {"conversation": [{"role": a, "content": b} for a, b in chat]},
        {"messages": [{"role": a, "content": [{"type": "text", "text": b}], "name": None} for a, b in chat]},
        {"messages": [{"role": a, "content": [b[:7], {"text": b[7:]}]} for a, b in chat]},
        {"text": None, "messages": None, "conversations": [{"from": a, "value": b} for a, b in chat]},
        {
            "prompt": [{"from": old[a], "value": b} for a, b in chat[:3]],
            "completion": [{"from": "gpt", "value": text(3)}],
        },
    ):
        assert Encoder(TOKENIZER).encode(row, "here") == wanted, row
        assert Encoder(TOKENIZER).encode(json.dumps(row), "here") == wanted, row
    for turn, message in (
        ({"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}, "another kind than text: 'image_url'"),
        ({"role": "user", "content": 3}, "content is int, not text"),
        ({"content": "a"}, "without a role"),
        ("a", "no object"),
        ({"role": "user", "content": "\ud800"}, "half of a surrogate pair"),
    ):
        with pytest.raises(DataError, match=f"here has a turn 1.*{message}|here holds.*{message}"):
            Encoder(TOKENIZER).encode({"messages": [turn]}, "here")


def test_calls_of_tools_have_no_content():
    calls = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    turns = [{"role": "user", "content": text(0)}, {"role": "assistant", "content": None, "tool_calls": calls}]
    turns += [{"role": "tool", "content": text(1)}, {"role": "assistant", "content": text(2)}]
    tokenizer = testbed.build_tokenizer()
    with pytest.warns(LearnevictWarning, match="does not show tool calls"):
        Encoder(tokenizer).encode({"messages": turns}, "here")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content + ' ' }}{% if m.tool_calls %}look {% endif %}{% endfor %}"
    )
    found, prompt = Encoder(tokenizer).encode({"messages": turns}, "here")
    assert found == ids(f"{text(0)} look {text(1)} {text(2)}") and len(found) - prompt == 5


def test_processes_share_a_stream(jsonl):
    source = Source(str(jsonl), streaming=True)
    alone = list(islice(Stream(source, TOKENIZER), 12))
    both = [Stream(source, TOKENIZER, rank=rank, num_ranks=2) for rank in range(2)]
    found = [list(islice(one, 6)) for one in both]
    assert [one for pair in zip(*found, strict=True) for one in pair] == alone
    assert both[0].state_dict() == both[1].state_dict()


def test_a_stream_without_documents_ends_with_an_error(jsonl):
    with pytest.raises(DataError, match="no document of at least 6 tokens"):
        next(iter(Stream(Source(str(jsonl), streaming=True), TOKENIZER, shortest=6)))
    assert next(iter(Stream(Source(str(jsonl), streaming=True), TOKENIZER, shortest=5))).input_ids == ids(text(0))


def test_the_testbed_holds_out_other_samples():
    learn, held_out = read_for_learning(Source("testbed"), TOKENIZER, 4, 3, families_of("recall,program"))
    assert [one.family for one in learn] == ["recall", "program", "recall", "program"]
    assert [one.seed for one in learn] == [0, 0, 1, 1]
    assert not {tuple(one.input_ids) for one in learn} & {tuple(one.input_ids) for one in held_out}
    assert 0 < learn[0].prompt_length < len(learn[0].input_ids)
    with pytest.raises(UsageError, match="drop --packed"):
        read_source(Source("testbed", packed=True), TOKENIZER, 1)
    with pytest.raises(UsageError, match="no such task family: sudoku"):
        families_of("sudoku")


def test_a_family_named_again_brings_other_texts():
    """Its share of the mixture grows, and not the number of times that its texts are read."""
    found = read_source("testbed", TOKENIZER, 8, families=families_of("program, recall,program"))
    assert [one.family for one in found] == ["program", "recall", "program"] * 2 + ["program", "recall"]
    assert [one.seed for one in found] == [0, 0, 1, 2, 1, 3, 4, 2]
    assert len({tuple(one.input_ids) for one in found}) == 8


def test_batches_are_left_padded_and_know_their_prompts():
    batch = Collator(9)([Document([1, 2, 3], 2, "a", 0), Document([4], 0, "a", 1)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert torch.equal(batch["prompt_length"], torch.tensor([2, 0]))
    assert batch["stored_labels"] is None
    with pytest.raises(DataError, match="no text has the 4 tokens"):
        long_enough([Document([1, 2, 3], 0, "a", 0)], 4)
