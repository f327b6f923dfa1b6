"""What is left of a path when gates go to other people."""

from __future__ import annotations

import pytest

from learnevict.hub.paths import without_folders

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
