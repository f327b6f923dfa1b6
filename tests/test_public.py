"""What other people's code stands on: public names, the cost of an import, what a wheel holds, what README and docs say."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import learnevict

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = {"attach", "methods", "EvictingCache", "Gates", "oracle", "replay", "__version__"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def repository_files() -> list[Path]:
    """Files that are tracked or would be: ignored ones left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_public_names():
    assert set(learnevict.__all__) == PUBLIC
    assert set(dir(learnevict)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_resolves(name):
    assert getattr(learnevict, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="evict_all"):
        _ = learnevict.evict_all


def test_versions_agree():
    assert f'version = "{learnevict.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("module", ["learnevict", "learnevict.cli"])
def test_importing_loads_nothing_heavy(module):
    heavy = {"torch", "transformers", "matplotlib", "datasets"}
    assert run_python(f"import sys, {module}; print({heavy} & set(sys.modules))").strip() == "set()"


@pytest.mark.slow
def test_a_core_install_is_enough():
    """Every public name works where no extra is installed: the extras are hidden from this interpreter."""
    hidden = ["datasets", "pyarrow", "trl", "peft", "wandb", "deepspeed", "matplotlib", "triton", "beartype", "psutil"]
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); import learnevict as it"
    run_python(f"{code}; [getattr(it, name) for name in it.__all__]")


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_data(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path.relative_to(ROOT).as_posix() for path in repository_files()]
    expected = {name for name in files if name.startswith("learnevict/")}
    expected |= {name.removeprefix("kernels/") for name in files if name.startswith("kernels/learnevict_kernels/")}
    assert held == expected
    assert "learnevict/py.typed" in held


# Paths of one machine, addresses of package indexes, pages that are not in this repository, notes to self.
UNWANTED = re.compile(
    r"/(?:root|work|home)/[a-z]|https?://\S*(?:pypi|/simple\b|mirror)|\bshared/(?:design|reference|hooks)|"
    r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b"
)


def test_no_traces_of_a_machine():
    wrong = []
    for path in repository_files():
        if path.suffix in {".safetensors", ".png", ".parquet"} or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if found := UNWANTED.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {found[0]}")
    assert not wrong, "\n".join(wrong)


def shown_commands(page: Path) -> list[list[str]]:
    """Command lines in the shell blocks of a page, continuation lines joined, split into words."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.strip()]


def cli_options(command: str) -> set[str]:
    from typer.main import get_command

    from learnevict.cli import app

    commands = get_command(app).commands
    assert command in commands, f"learnevict {command}: no such command"
    return {option for parameter in commands[command].params for option in (*parameter.opts, *parameter.secondary_opts)}


def flags_of(words: list[str]) -> set[str]:
    """Flags in the help of a command that hands its words on to a program."""
    method = [word for word in words[1:2] if not word.startswith("-")]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        from learnevict.cli import main

        assert main([words[0], *method, "--help"]) == 0
    return set(re.findall(r"--[\w-]+", out.getvalue()))


def test_readme_shows_commands_that_exist():
    commands = shown_commands(ROOT / "README.md")
    named = {words[0] for words in commands if words}
    assert {"scripts/demo", "scripts/test"} <= named
    for words in commands:
        for word in words:
            if re.fullmatch(r"(?:\./)?(?:scripts|recipes|benchmarks|kernels)/[\w./-]+", word):
                assert (ROOT / word).exists(), f"README names {word}"
        if len(words) > 1 and words[0] == "learnevict" and not words[1].startswith("-"):
            given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            known = flags_of(words[1:]) if words[1] in ("train", "refine") else cli_options(words[1])
            unknown = given - known - {"--help"}
            assert not unknown, f"README gives learnevict {words[1]} {sorted(unknown)}"


def test_readme_python_compiles():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL):
        compile(block, "README.md", "exec")


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
MADE = re.compile(r"(?:/|~/|runs/|site/|user/|path/|\.venv|application/|my_|linear_future|x/|kernels/__init__)")
"""How paths begin that are made at run time, belong to a reader, or must not be there."""


def named_paths(page: str) -> set[str]:
    """What a page says in backticks and means as a file or folder of this repository."""
    spans = set(re.findall(r"`([^`\s]+)`", re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)))
    shape = re.compile(r"[\w.<>*-]+(?:/[\w.<>*-]*)+|[\w<>*-]+\.(?:py|md|ipynb|toml|yaml|txt)")
    return {span for span in spans if shape.fullmatch(span) and not MADE.match(span) and not re.match(r"\d+/\d+", span)}


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_pages_name_exist(page):
    """A path counts from the root, the package or docs/; `<name>` and `NAME` stand for anything."""
    homes = (ROOT, ROOT / "learnevict", ROOT / "docs")
    wrong = [
        path
        for path in sorted(named_paths(page))
        if not any(any(home.glob(re.sub(r"<\w+>|[A-Z]{4,}(?!\w*\.md)", "*", path.rstrip("/")))) for home in homes)
    ]
    assert not wrong, f"{page} names {', '.join(wrong)}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_pages_name_exist(page):
    """`learnevict.a.b` is a module, or a name that the text of its module has."""
    for name in sorted(set(re.findall(r"\blearnevict(?:\.\w+)+", (ROOT / page).read_text()))):
        parts = name.split(".")
        while parts and not (module := ROOT.joinpath(*parts).with_suffix(".py")).exists():
            if (module := ROOT.joinpath(*parts, "__init__.py")).exists():
                break
            parts.pop()
        rest = name.split(".")[len(parts) :]
        assert all(re.search(rf"\b{word}\b", module.read_text()) for word in rest[:1]), f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}"
