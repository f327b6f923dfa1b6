"""Records of runs: there while a run lasts, honest about how it ended, silent about whose machine it was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import TrainingArguments

from learnevict.errors import DataError
from learnevict.hub.run_record import Record, changed, commit, read_record, without_folders


@dataclass(frozen=True)
class Given:
    folder: Path = Path("runs/x")
    budgets: tuple[int, int] = (1, 2)


def test_a_record_is_there_while_the_run_lasts(tmp_path):
    with Record(tmp_path / "run", "distill", {"given": Given()}, base_hash="b") as record:
        early = read_record(tmp_path / "run")
        assert early is not None
        assert (early["status"], early["base_hash"]) == ("running", "b")
        assert early["config"] == {"given": {"folder": "runs/x", "budgets": [1, 2]}}
        record.add(log=[{"loss": 1.0}])
        assert read_record(tmp_path / "run")["log"] == [{"loss": 1.0}]
    late = read_record(tmp_path / "run")
    assert late["status"] == "finished"
    assert late["seconds"] >= 0
    assert {"python", "torch", "transformers", "learnevict"} <= set(late["versions"])
    assert not list((tmp_path / "run").glob("*.part"))


def test_how_it_ended_is_told(tmp_path):
    for error, status in ((KeyboardInterrupt(), "interrupted"), (ValueError("no"), "failed")):
        with pytest.raises(type(error)), Record(tmp_path, "distill"):
            raise error
        assert read_record(tmp_path)["status"] == status
    assert read_record(tmp_path)["error"] == "ValueError: no"


def test_a_record_that_cannot_be_written_hides_no_error_and_keeps_no_lock(tmp_path):
    def fail() -> None:
        with Record(tmp_path, "distill"):
            (tmp_path / "run.json").unlink()
            (tmp_path / "run.json").mkdir()  # nobody can write a file here now
            raise ValueError("the real error")

    with pytest.raises(ValueError, match="the real error"):
        fail()
    (tmp_path / "run.json").rmdir()
    with Record(tmp_path, "distill"):
        pass
    assert read_record(tmp_path)["status"] == "finished"


def test_a_run_that_goes_on_remembers_the_sessions_before(tmp_path):
    with pytest.raises(KeyboardInterrupt), Record(tmp_path, "oracle"):
        raise KeyboardInterrupt
    with Record(tmp_path, "oracle", goes_on=True):
        pass
    with Record(tmp_path, "oracle", goes_on=True):
        pass
    assert [one["status"] for one in read_record(tmp_path)["sessions"]] == ["interrupted", "finished"]
    with Record(tmp_path, "oracle"):
        assert "sessions" not in read_record(tmp_path)


def test_only_one_process_writes(tmp_path):
    with Record(tmp_path / "run", "oracle", writes=False) as record:
        record.add(log=1)
    assert not (tmp_path / "run").exists()
    assert read_record(tmp_path / "run") is None


def test_what_is_no_record_is_refused(tmp_path):
    for text in ("{", "[]"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(DataError, match="not the record of a run"):
            read_record(tmp_path)


def test_nothing_of_the_machines_owner(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/users/of/somebody")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    training = TrainingArguments(output_dir="runs/x", learning_rate=0.5, hub_token="hf_other", report_to="none")
    with (
        pytest.raises(ValueError, match="x"),
        Record(tmp_path, "distill", training=changed(training), data="/users/of/somebody/a"),
    ):
        raise ValueError("/users/of/somebody/x")
    text = (tmp_path / "run.json").read_text()
    assert not any(word in text for word in ("somebody", "hf_secret", "hf_other", str(Path.cwd()), str(tmp_path)))
    assert (json.loads(text)["data"], json.loads(text)["error"]) == ("~/a", "ValueError: ~/x")
    assert json.loads(text)["training"] == {"output_dir": "runs/x", "learning_rate": 0.5}


def test_what_results_carry_away_names_no_folder(tmp_path):
    config = {"model": "/models/of/somebody/base", "data": "user/chats", "start_from": "runs/scorer"}
    with Record(tmp_path, "distill", config, training={"output_dir": str(tmp_path)}) as record:
        pass
    assert record.origin["config"] == {"model": "base", "data": "user/chats", "start_from": "runs/scorer"}
    assert record.origin["training"] == {"output_dir": tmp_path.name}
    assert read_record(tmp_path)["config"] == config, "the record itself stays here, and says what to give again"


def test_the_commit_is_that_of_this_code():
    found = commit()
    assert found is None or (len(found["commit"]) == 40 and isinstance(found["dirty"], bool))


# --- what is left of a path when gates go to other people ---

REDUCED = {
    "/tmp/x/base": "base",
    "/corpus": "corpus",
    "/home/Jane Doe/data/": "data",
    "~/runs/x": "x",
    "C:\\Users\\jane\\x": "x",
    "\\\\server\\share\\x": "x",
    "file:///a/b": "b",
    "ValueError: '/home/Jane Doe/x y' is no file": "ValueError: 'x y' is no file",
    "cannot open /tmp/a/b, nor ~/q/r: no": "cannot open b, nor r: no",
    "--out=/a/b/c": "--out=c",
    "see https://a.b/c/d and /a/b": "see https://a.b/c/d and b",
}
KEPT = (
    "user/repo",
    "runs/x",
    "../x/y",
    "1/4",
    "tokens/s",
    "[/INST] </s>",
    "/",
    "https://a.b/c",
    "hf://a/b",
    r"\d+\w",
    "",
)


@pytest.mark.parametrize("path", REDUCED)
def test_paths_keep_their_last_part(path):
    assert without_folders({"a": [path, {"b": (path,)}]}) == {"a": [REDUCED[path], {"b": [REDUCED[path]]}]}


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_path_of_a_machine_stays(text):
    assert without_folders(text) == text


def test_other_values_stay():
    content = {"a": 1, "b": None, "c": [0.5, True], "d": {}}
    assert without_folders(content) == content
