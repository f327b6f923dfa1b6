"""Recipes are programs that people start: the commands that pages and docstrings show, their flags, what they refuse."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from learnevict.errors import DataError, LearnevictError, UsageError
from learnevict.evals import tuning
from learnevict.files import locked
from tools.results.ablations import check_same

# TRL and what it brings: a flag has a new name that the oldest transformers does not know, rollouts are experimental.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:You are using 'rollout_func'"
)

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
HEAVY = {"ablate", "demo", "distill", "grpo"}
"""These import trainers, which takes seconds."""
PARAMETERS = [pytest.param(name, marks=[pytest.mark.slow] * (name in HEAVY)) for name in RECIPES]


def commands_of(text: str) -> list[list[str]]:
    """Words of the command lines in the indented blocks of a text, continuation lines joined."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    starts = re.compile(r" {4}(?=(?:python|accelerate|torchrun|scripts/\w+) ?)")
    return [shlex.split(line, comments=True) for line in lines if starts.match(line)]


def shown() -> list[tuple[str, list[str]]]:
    """Every command shown in a recipe's docstring or in docs/scale.md: where, and its words."""
    pages = {
        f"recipes/{name}.py": ast.get_docstring(ast.parse((ROOT / "recipes" / f"{name}.py").read_text()))
        for name in RECIPES
    }
    pages["docs/scale.md"] = (ROOT / "docs" / "scale.md").read_text()
    return [(page, words) for page, text in pages.items() for words in commands_of(text or "")]


def flags_for(recipe: str) -> list[list[str]]:
    """What is given to a recipe, wherever it is shown."""
    path = f"recipes/{recipe}.py"
    given = [words[words.index(path) + 1 :] for _, words in shown() if path in words]
    return [[word for word in words if word != "--help"] for words in given]


@functools.cache
def imported(name: str) -> Any:
    return importlib.import_module(f"recipes.{name}")


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """Reads a recipe's flags as it does itself; nothing is run."""
    (tmp_path / "config.yaml").write_text("max_steps: 10\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.syspath_prepend(ROOT / "recipes")

    def read(name: str, words: list[str]) -> Any:
        recipe = imported(name)
        if name in ("distill", "grpo"):
            return recipe.parse(words)
        monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *words])
        return recipe.parse()

    return read


def test_shown_commands_name_files_that_exist():
    found = shown()
    assert {page for page, _ in found} == {f"recipes/{name}.py" for name in RECIPES} | {"docs/scale.md"}
    for page, words in found:
        for word in words:
            if re.match(r"(?:scripts|recipes|benchmarks)/", word):
                assert (ROOT / word).exists(), f"{page} names {word}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_shown_commands_are_understood(name, parsed):
    commands = flags_for(name)
    assert commands, f"recipes/{name}.py shows no command"
    for words in commands:
        config = parsed(name, words)
        if name == "compare_labels":
            names = [one.strip() for one in config.variants.split(";") if one.strip()]
            assert set(names) <= set(imported(name).VARIANTS), words


# --- flags that make no sense ---

NO_NUMBERS = ("nan", "inf", "-7", "9" * 20)
NO_WORDS = ("../x", "")


def values_of(config: Any) -> dict[str, Any]:
    """Values of all flags, by name."""
    if hasattr(config, "training"):
        return {**vars(config.training), **vars(config.common), **vars(config.mode), **config.settings}
    parts = config if isinstance(config, tuple) else (config,)
    return {name: value for part in reversed(parts) for name, value in vars(part).items()}


def no_sense(read: Any, usual: dict[str, Any]) -> dict[str, list[str]]:
    """Numbers that are taken though they make no sense; any error but ours and argparse's comes through."""
    taken: dict[str, list[str]] = {}
    for flag, value in usual.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        for word in NO_NUMBERS if number else NO_WORDS:
            try:
                read([f"--{flag}={word}"])
            except (LearnevictError, SystemExit):
                continue
            if number and (flag, word) != ("bias", "-7"):
                taken.setdefault(flag, []).append(word)
    return taken


@pytest.mark.parametrize("name", PARAMETERS)
def test_no_flag_takes_what_makes_no_sense(name, parsed):
    usual = values_of(parsed(name, []))
    flags = {flag: value for flag, value in usual.items() if not flag.startswith("_")}
    assert not no_sense(lambda words: parsed(name, words), flags)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kvpop", "trimkv", "dms", "kvzap", "judge_q", "lookahead_kv"])
def test_no_flag_of_a_mode_or_gate_takes_what_makes_no_sense(method, parsed):
    found = parsed("distill", ["--method", method])
    flags = {**vars(found.mode), **found.settings}
    assert not no_sense(lambda words: parsed("distill", ["--method", method, *words]), flags)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("evaluate", ["--gates", "nowhere"]), ("evaluate", ["--budgets", "1/4,zz"]), ("evaluate", ["--out", ""]),
        ("compare_labels", ["--shares", "zz"]), ("compare_labels", ["--split", "zz"]), ("pretrain", ["--device", ""]),
        ("oracle", ["--families", "zz"]), ("tables", ["--output_dir", ""]),
        pytest.param("ablate", ["--rows", "12"], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_words_that_make_no_sense_are_refused_before_a_model_is_opened(name, words, parsed):
    with pytest.raises(LearnevictError, match=words[-1].split(",")[-1] or "is empty"):
        parsed(name, words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--method", "../x"], ["--method", ""], ["--method", "os"], ["--method", "a.b..c"], ["--window", "0"],
        ["--hidden", "0"], ["--report_to", "zzz"], ["--output_dir", ""], ["--lr_scheduler_kwargs", "zzz"], ["--deepspeed", "1"],
        ["--accelerator_config", "nowhere.json"], ["--eval_budgets", "zz"], ["--eval_budgets", "64", "-1"],
        ["--families", "zzz"], ["--gpu_memory", "zzz"], ["--max_steps", "0"], ["--save_steps", "0"], ["nowhere.yaml"],
        ["--optim_args", "zzz"], ["--optim", "sgd", "--lr_scheduler_kwargs", '{"zzz": 1}'], ["--optim", "adamw_bnb_8bit"],
    ],
)  # fmt: skip
def test_distilling_is_refused_before_any_work(words, parsed):
    with pytest.raises(LearnevictError) as caught:
        parsed("distill", words)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill", "grpo"])
@pytest.mark.parametrize(
    "line",
    [
        "max_steps: null", "seed: null", "documents: null", "max_steps: [1, 2]", "learning_rate: {a: 1}", "learning_rate: .nan",
        "documents: [1]", "eval_steps: [[1]]", "model: null", "x: " + "[" * 5000 + "]" * 5000, "&a [*a]", "12", "",
        "max_steps: -2",
    ],
)  # fmt: skip
def test_files_of_flags_that_make_no_sense_are_refused(name, line, parsed, tmp_path):
    (tmp_path / "config.YAML").write_text(line)
    with pytest.raises((LearnevictError, SystemExit)):
        parsed(name, [str(tmp_path / "config.YAML")])


@pytest.mark.slow
def test_files_of_flags_may_hold_nothing_and_lists_where_flags_do(parsed, tmp_path):
    lines = "eval_steps: null\nsave_total_limit: null\ncolumn: null\nlabels: null\neval_budgets: [64, 25%]\nbudgets: [40, 90]\n"
    (tmp_path / "config.yaml").write_text(lines + "lr_scheduler_kwargs: {num_cycles: 2}\n")
    found = parsed("distill", [str(tmp_path / "config.yaml")])
    assert (found.common.eval_budgets, found.mode.budgets) == (["64", "25%"], (40, 90))
    assert (found.training.eval_steps, found.training.lr_scheduler_kwargs) == (None, {"num_cycles": 2})


@pytest.mark.parametrize("name", ["grpo", "ablate"])
def test_a_missing_package_is_told_in_one_line(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert caught.value.code == 1 and "pip install 'learnevict[train]'" in said and said.count("\n") == 1


# --- evaluate ---


def test_smoke_fills_in_what_was_not_said(parsed):
    config = parsed("evaluate", ["--smoke"])
    assert (config.families, config.samples, config.out) == ("recall", 4, "runs/evaluate-smoke")
    config = parsed("evaluate", ["--smoke", "--families", "program", "--samples", "200", "--out", "docs/results"])
    assert (config.families, config.samples, config.out, config.tuning_samples) == ("program", 200, "docs/results", 4)
    assert parsed("evaluate", ["--tuning_samples", "3", "--batch-size", "2"]).tuning_samples == 3
    assert parsed("evaluate", []) == imported("evaluate").Config()
    assert parsed("compare_labels", ["--smoke", "--shares", "1/4"]).shares == "1/4"
    with pytest.raises(UsageError, match="no stage nope; choose all, tune"):
        parsed("evaluate", ["--stage", "nope"])


def test_only_the_usual_place_feeds_the_package(parsed, tmp_path):
    evaluate = imported("evaluate")
    assert evaluate.tuned_path(parsed("evaluate", [])) == tuning.TUNED
    assert evaluate.tuned_path(parsed("evaluate", ["--out", "docs/results/"])) == tuning.TUNED
    assert evaluate.tuned_path(parsed("evaluate", ["--out", str(tmp_path)])) == tmp_path / "tuned.json"
    smoke = parsed("evaluate", ["--out", "docs/results", "--smoke"])
    assert evaluate.tuned_path(smoke) == Path("docs/results/tuned.json")


# --- pretrain ---


def test_an_adapter_goes_over_nothing_else(parsed, tmp_path):
    """Neither over files of others, such as the base itself, nor over a run with other settings."""
    adapt, out = imported("adapt"), tmp_path / "o"
    out.mkdir()
    (out / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="holds what this program did not write"):
        adapt.main(parsed("adapt", ["--smoke", "--output_dir", str(out)]))
    assert (out / "README.md").read_text() == "mine"
    settings = {**vars(parsed("adapt", ["--smoke", "--output_dir", str(out)])), "rank": 3}
    (out / "run.json").write_text(json.dumps({"program": "adapt", "config": settings}))
    with pytest.raises(UsageError, match="holds a run with other settings"):
        adapt.main(parsed("adapt", ["--smoke", "--output_dir", str(out)]))
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "run.json"]


def test_a_model_goes_where_it_is_told_and_over_nothing_else(parsed, tmp_path, capsys):
    """Also after a run that was killed between its last step and the export: the same command ends it."""
    pretrain, out = imported("pretrain"), tmp_path / "o"
    words = ["--smoke", "--out", str(out), "--steps", "2", "--final-samples", "1"]
    pretrain.main(parsed("pretrain", words))
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "data", "run.json"]
    assert sorted(path.name for path in (out / "data").iterdir()) == list(pretrain.EXPORTED[0])
    before = (out / "data" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "data")
    pretrain.main(parsed("pretrain", words))
    pretrain.main(parsed("pretrain", words))
    assert (out / "data" / "model.safetensors").read_bytes() == before
    with pytest.raises(UsageError, match="2 steps already; give --steps above that, or --export"):
        pretrain.main(parsed("pretrain", [*words, "--steps", "1"]))
    with pytest.raises(UsageError, match=r"--data .* is no flag here"):
        parsed("pretrain", [*words, "--data", str(tmp_path)])
    mine = tmp_path / "mydata"
    for folder, more in ((mine, ["--export-to", str(mine)]), (mine / "checkpoint", ["--out", str(mine)])):
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("mine")
        with pytest.raises(DataError, match=r"holds thesis.txt, not written by this program; choose another folder"):
            pretrain.main(parsed("pretrain", [*words, *more]))
        assert (folder / "thesis.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="--out cannot be in it"):
        pretrain.main(parsed("pretrain", [*words, "--export-to", str(tmp_path)]))
    with pytest.raises(UsageError, match="no checkpoint in"):
        pretrain.main(parsed("pretrain", ["--export", "--smoke", "--out", str(tmp_path / "new")]))
    assert not (tmp_path / "runs").exists()
    with locked(out / "data.export"), pytest.raises(UsageError, match="another process is writing"):
        pretrain.main(parsed("pretrain", words))


# --- tables ---


def test_a_table_of_labels_that_is_being_written_is_left_alone(parsed, tmp_path):
    out = tmp_path / "labels.json"
    with locked(out), pytest.raises(UsageError, match="another process is writing"):
        imported("compare_labels").main(parsed("compare_labels", ["--smoke", "--out", str(out)]))
    assert not out.exists()


def test_tables_of_another_run_stay(parsed, tmp_path):
    (tmp_path / "testbed-lexical").mkdir()
    words = ["--smoke", "--output_dir", str(tmp_path)]
    for record in (None, {"program": "tables", "config": {"documents": 2000, "samples": 40}}):
        if record is not None:
            (tmp_path / "run.json").write_text(json.dumps(record))
        with pytest.raises(UsageError, match="holds tables of another run; choose another --output_dir"):
            imported("tables").main(parsed("tables", words))


# --- ablate ---


def variant(name: str, **changes: Any) -> dict[str, Any]:
    common = {"settings": {"kl": 0.0}, "steps": 60, "rows": 32, "samples": 60, "start": "a"}
    return {"name": name, **common, **changes}


@pytest.mark.parametrize(
    ("done", "words"),
    [
        (variant("one", steps=10), "'one' with other steps"),
        (variant("not asked for now", steps=10), "other steps"),
        (variant("one", rows=8, start="b"), "other rows and start"),
        (variant("start", steps=0, settings={"kl": 0.1}), "other settings"),
    ],
)
def test_variants_of_one_table_differ_in_one_thing(done, words):
    wanted = [variant("start", steps=0), variant("one"), variant("two", settings={"kl": 0.1})]
    check_same([variant("start", steps=0), variant("one"), variant("three")], wanted, Path("a.json"))
    with pytest.raises(UsageError, match=f"a.json holds .*{words} .*choose another --out"):
        check_same([done], wanted, Path("a.json"))


@pytest.mark.slow
def test_an_ablation_goes_on_and_refuses_other_terms(parsed, tmp_path):
    words = ["--smoke", "--out", str(tmp_path / "a.json")]
    ablate = imported("ablate")
    ablate.main(parsed("ablate", words))
    before = (tmp_path / "a.json").read_text()
    ablate.main(parsed("ablate", words))
    assert (tmp_path / "a.json").read_text() == before and before.count('"name"') == 2
    with pytest.raises(UsageError, match="other rows"):
        ablate.main(parsed("ablate", [*words, "--rows", "16"]))


# --- texts ---


def test_texts_are_cut_at_paragraphs_and_parted(parsed, tmp_path, capsys):
    texts = imported("texts")
    for _ in range(2):  # the second takes the place of the first
        texts.main(parsed("texts", ["--smoke", "--out", str(tmp_path / "prose")]))
    read = {name: (tmp_path / "prose" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")}
    train, test = ([json.loads(line)["text"] for line in lines] for lines in read.values())
    assert len(train) > 3 * len(test) > 0
    assert all(len(one) >= 12_000 for one in test)
    assert (tmp_path / "prose" / "text.txt").read_text() == "\n\n".join(test)
    (tmp_path / "prose" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds mine\.txt, not written by this program"):
        texts.main(parsed("texts", ["--smoke", "--out", str(tmp_path / "prose")]))


def test_texts_of_a_page_are_its_prose(tmp_path):
    page = tmp_path / "page.html"
    menu, listed = "<dl><dt>menu</dt></dl>", '<ul><li><div class="para">\n\t\tThree.<br/></div></li></ul>'
    page.write_text(f"<title>T</title><h1>Head</h1>{menu}<p>One <b>bold</b> &amp; two.</p>{listed}")
    text = imported("texts").read_files([page])
    assert [part.strip("\n") for part in text.split("\n\n")][:3] == ["Head", "One bold & two.", "Three."]
