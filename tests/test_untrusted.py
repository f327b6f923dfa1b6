"""What strangers wrote reaches terminals, tables, cards and spreadsheets as text, and as nothing else."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from learnevict import Gates
from learnevict.cli import console
from learnevict.cli import output as cli_results
from learnevict.cli.output import progress, show_rows
from learnevict.errors import DataError, GateError, told_in_one_line
from learnevict.evals.records import read_rows
from learnevict.evals.report import write_report
from learnevict.evals.viz import page
from learnevict.hub import GATES_FOLDER, Address, GatesConfig, make_card, weight_hash
from learnevict.infer.generate import printer
from learnevict.signals import NEVER, Trace
from learnevict.untrusted import CONTROLS, one_line, printable, spreadsheet_cell

PACKAGE = Path(__file__).resolve().parent.parent / "learnevict"
RED, BACKWARDS = "\x1b[31m", "\u202e"
CONTROL = f"a{RED}b\x07\x08{BACKWARDS}c\u2066d\x9b2Je\x7f"
EVIL = f"=1+1\n# owned\n\n<img src=x onerror=alert(1)> [click](javascript:alert(1)) | `rm` [bold]loud[/bold] $\\frac$ {CONTROL}"
FORMULAS = ("=1+1", "+1", "-cmd", "@SUM(A1)", "\t=1", " \r=1", "＝1")


def evil_row(**parts: Any) -> dict[str, Any]:
    """A row of an evaluation whose every text is hostile."""
    texts = dict.fromkeys(("method", "family", "model", "split", "length", "budget_share", "kind"), EVIL)
    figures = {"budget": 64, "step_accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6, "samples": 8}
    return {**texts, **figures, "rules": {"slack": EVIL, "sinks": 4}, **parts}


def is_harmless(text: str) -> None:
    """As Markdown: nothing but what the package itself writes."""
    assert not CONTROLS.search(text)
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<" not in outside.replace("<!--", "")
    assert "](javascript" not in outside
    assert not re.search(r"^\s*# owned", text, re.MULTILINE)
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert all(line.count("|") - line.count("\\|") in widths(outside) for line in rows), rows


def widths(text: str) -> set[int]:
    """How many bars the rules of the tables have."""
    return {line.count("|") for line in text.splitlines() if re.fullmatch(r"[|\s-]+", line) and "-" in line}


def test_text_for_a_terminal():
    assert printable("Grüße\n\t日本 👩‍💻 \u200f") == "Grüße\n\t日本 👩‍💻 \u200f"
    assert not CONTROLS.search(printable(CONTROL + "\r\ud800\u2028"))
    record = {"text": CONTROL + "\r\n"}
    assert json.loads(printable(json.dumps(record, ensure_ascii=False))) == record
    assert one_line(" a\u2028 b\n c ") == "a b c"
    assert [spreadsheet_cell(formula)[0] for formula in FORMULAS] == ["'"] * len(FORMULAS)
    assert [spreadsheet_cell(value) for value in (-1.5, None, "a=b", "1/4")] == [-1.5, None, "a=b", "1/4"]


def test_nothing_of_a_stranger_reaches_the_terminal_raw(capsys, monkeypatch):
    """Errors, warnings, tracebacks, standard output, answers, tables and bars."""
    cli_results.say(f"error: {CONTROL}")
    cli_results.tell(CONTROL)
    console._show_warning(UserWarning(CONTROL))
    with pytest.raises(SystemExit), told_in_one_line("again"):
        raise DataError(CONTROL)

    def fail(*_: object, **__: object) -> None:
        raise GateError(CONTROL)

    monkeypatch.setattr(console, "app", fail)
    assert console.main(["--debug"]) == 1
    show_rows([evil_row()])
    tokenizer: Any = Gates  # only its `decode` is asked for
    monkeypatch.setattr(tokenizer, "decode", lambda *_, **__: CONTROL, raising=False)
    streamer: Any = printer(tokenizer)
    streamer.on_finalized_text(CONTROL, stream_end=True)
    out, err = capsys.readouterr()
    assert not CONTROLS.search(out + err), repr(out + err)
    assert err.count("\\u001b[31m") >= 4 and out.count("\\u001b[31m") >= 3
    assert "[bold]loud[/bold]" in " ".join(out.split()), "markup is text"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress(2) as advance:
        advance(f"[bold]x[/nothing] {RED}", 1)
    assert "\x1b[31m" not in capsys.readouterr().err


def test_one_place_writes_to_the_terminal():
    wrong = re.compile(r"typer\.echo\(|sys\.std(out|err)\.write\(|traceback\.print_exc|click\.echo\(|(?<![.\w])print\(")
    found = {
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in (PACKAGE / "cli").glob("*.py")
        if path.name != "output.py"
        for line in path.read_text().splitlines()
        if wrong.search(line)
    }
    assert not found


def test_rows_write_no_markdown_into_a_report(tmp_path):
    formulas = [evil_row(method=formula, family=formula) for formula in FORMULAS[:-1]]
    nothing = dict.fromkeys(("method", "family"), "x") | {"budget": None, "perplexity": 2.0, "perplexity_ratio": 1.0}
    table, sheet, _ = write_report([evil_row(), evil_row(budget=32, budget_share=None), nothing, *formulas], tmp_path)
    is_harmless(table.read_text())
    with sheet.open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.strip()[:1] in tuple("=+-@＝")]
    assert "0.5" in cells and not CONTROLS.search(sheet.read_text())


def test_gates_and_rows_write_no_markdown_into_a_card():
    layout: Any = Gates.load("testbed-foresightkv").config.layout
    settings = {"hidden": 8, "period": 16, "window": 16}
    training = {"config": {EVIL: EVIL, "data": EVIL, "documents": EVIL, "families": EVIL}, "data_hash": EVIL}
    gates = Gates(
        GatesConfig(
            layout=layout, settings=settings, training=training, base_name=EVIL, base_revision=EVIL, base_hash=EVIL
        )
    )
    rows = [
        evil_row(method="foresightkv", gates=weight_hash(gates)),
        evil_row(kind="heuristic"),
        evil_row(method="foresightkv", gates=weight_hash(gates), step_accuracy=None, perplexity=2.0, budget_share=None),
    ]
    text = make_card(gates, Address("me/gates"), rows, license=EVIL)
    _, metadata, body = text.split("---\n", 2)
    is_harmless(body)
    assert not CONTROLS.search(metadata) and "<img" not in metadata.partition("license:")[0]


def test_rows_with_texts_for_numbers_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(evil_row(step_accuracy=EVIL)) + "\n")
    with pytest.raises(DataError, match=r"step_accuracy .* is no number"):
        read_rows(path)


def test_shipped_gates_are_shown_as_before():
    """What is harmless is not touched."""
    for folder in GATES_FOLDER.iterdir():
        text = json.dumps(json.loads((folder / "config.json").read_text()))
        assert printable(text) == text


def test_a_page_shows_no_reordered_text():
    """Its scripts write text only; what would reorder that text is written out."""
    trace = Trace(torch.full((1, 1, 1, 2), NEVER, dtype=torch.int32))
    shown = page(trace, [EVIL, CONTROL], EVIL, EVIL)
    data = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', shown, re.DOTALL)[1])
    assert not [text for text in (*data["tokens"], data["title"], data["about"]) if CONTROLS.search(text)]
    script = (PACKAGE / "evals" / "viz.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
