"""The layers of the package, read from its imports; and what no file of it may contain."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "learnevict"

# A row imports only rows above it. Within a row, packages are blind to each other, but for the pairs of SIDEWAYS.
ROWS = (
    ("untrusted",),
    ("errors", "config", "files", "ops"),
    ("signals",),
    ("policy",),
    ("parts", "infer"),
    ("methods", "oracle", "testbed"),
    ("hub",),
    ("data",),
    ("train", "evals"),
    ("rl",),
    ("cli",),
)
ROW = {package: row for row, packages in enumerate(ROWS) for package in packages}
SIDEWAYS = {
    ("config", "errors"),
    ("files", "errors"),
    ("ops", "errors"),
}

# Who may import what at all, and of these what only inside functions: a core install has none of the latter.
TRANSFORMERS = {"infer", "oracle", "data", "train", "hub", "rl", "testbed"}
ANYWHERE = {"transformers": TRANSFORMERS}
INSIDE_FUNCTIONS = {
    "datasets": {"data", "train", "rl", "evals"},
    "pyarrow": {"data", "train", "rl", "evals"},
    "deepspeed": {"train", "rl"},
    "peft": {"train", "rl", "hub"},
    "trl": {"rl"},
    "wandb": {"train", "rl"},
    "gguf": {"hub"},
    "matplotlib": {"evals", "cli"},
    "triton": {"ops", "cli"},
    "learnevict_kernels": {"ops"},
}
# Modules that only recipes import, so that they may need an optional package from their first line on.
ON_DEMAND = {"learnevict/rl/trainer.py"}  # a subclass of trl.GRPOTrainer
OUTSIDE = {"recipes", "tools", "benchmarks", "tests", "scripts", "pytest", "hypothesis", "beartype", "psutil"}

# Exceptions, each with its reason.
TENSORS_ONLY = {"learnevict/hub/published.py": "authors publish pickles; read once, if the user allows it"}
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}  # "learnevict/ops/scan.py::scan": reason


@dataclass(frozen=True)
class Import:
    """One imported module, as written at `path:line`; `scope` is module, typing or function."""

    path: Path
    line: int
    module: str
    scope: str

    @property
    def importer(self) -> str:
        """The package of the table that imports; "" for learnevict/__init__.py."""
        return package_of(self.path)

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def package_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


@cache
def parsed() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def modules_named(node: ast.AST, path: Path) -> list[str]:
    """Modules that an import, or import_module("..."), names; `from learnevict import hub` names learnevict.hub."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            folder = path.relative_to(ROOT).parts[: -node.level]
            base = ".".join([*folder, *filter(None, [base])])
        return [f"{base}.{alias.name}" for alias in node.names] if base == "learnevict" else [base]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def walk_imports(node: ast.AST, path: Path, scope: str = "module") -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inner = scope
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = "function"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inner = "typing"
        yield from (Import(path, child.lineno, name, inner) for name in modules_named(child, path))
        yield from walk_imports(child, path, inner)


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for path, tree in parsed().items() for found in walk_imports(tree, path))


def allowed_within(found: Import) -> bool:
    target = found.module.split(".")[1] if "." in found.module else ""
    if found.importer == "":  # the public names: types for readers, modules only when touched
        return found.scope != "module"
    if target == "__version__":
        return True
    if target not in ROW:  # a public name, or nothing of ours: import it from its home
        return False
    if target == found.importer or (found.importer, target) in SIDEWAYS:
        return True
    return ROW[target] < ROW[found.importer]


def test_every_module_has_a_row():
    unknown = {package_of(path) for path in parsed()} - set(ROW) - {""}
    assert not unknown, f"not in the layer table: {sorted(unknown)}"


def test_a_row_imports_only_rows_above():
    wrong = [str(found) for found in imports() if found.top == "learnevict" and not allowed_within(found)]
    assert not wrong, "\n".join(wrong)


def test_third_parties_stay_in_their_rows():
    table = ANYWHERE | INSIDE_FUNCTIONS
    wrong = [str(found) for found in imports() if found.importer not in table.get(found.top, {found.importer})]
    assert not wrong, "\n".join(wrong)


def test_optional_packages_are_imported_inside_functions():
    wrong = [
        str(found)
        for found in imports()
        if found.top in INSIDE_FUNCTIONS
        and found.scope == "module"
        and found.path.relative_to(ROOT).as_posix() not in ON_DEMAND
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_imports_nothing_outside():
    wrong = [str(found) for found in imports() if found.top in OUTSIDE]
    assert not wrong, "\n".join(wrong)


def test_kernels_are_imported_in_one_place():
    places = {(found.path, found.line) for found in imports() if found.top == "learnevict_kernels"}
    assert len(places) <= 1, sorted(map(str, places))
    for path in (ROOT / "kernels" / "learnevict_kernels").rglob("*.py"):
        names = [name for node in ast.walk(ast.parse(path.read_text())) for name in modules_named(node, path)]
        wrong = [name for name in names if name.startswith("learnevict.") and not name.startswith("learnevict.ops")]
        assert not wrong, f"{path.name} imports {wrong}; kernels know learnevict.ops only"


def test_kernels_folder_is_no_package():
    """With kernels/__init__.py, transformers would take ours for Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from transformers.utils import is_kernels_available as found; raise SystemExit(found())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment, cwd=ROOT)


def unsafe(node: ast.AST) -> bool:
    """Running what was downloaded or generated: pickle, eval, exec, torch.load, trust_remote_code=True."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        return any(name.partition(".")[0] in {"pickle", "cloudpickle", "dill", "marshal", "shelve"} for name in names)
    if not isinstance(node, ast.Call):
        return False
    if any(word.arg == "trust_remote_code" and ast.unparse(word.value) != "False" for word in node.keywords):
        return True
    return ast.unparse(node.func) in {"eval", "exec", "torch.load", "builtins.eval", "builtins.exec"}


def loads_tensors(node: ast.AST) -> bool:
    """torch.load(..., weights_only=True), which makes tensors and plain data and calls nothing."""
    words = [ast.unparse(word) for word in node.keywords] if isinstance(node, ast.Call) else []
    return "weights_only=True" in words and ast.unparse(node.func) == "torch.load"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec(code)",
        "torch.load(f)",
        "load(m, trust_remote_code=True)",
    ],
)
def test_what_counts_as_unsafe(line):
    assert any(map(unsafe, ast.walk(ast.parse(line))))
    assert not any(map(unsafe, ast.walk(ast.parse("model.eval(); load_file(path); load(m, trust_remote_code=False)"))))


def test_nothing_unsafe():
    wrong = [
        f"{path}:{node.lineno}"
        for path, tree in parsed().items()
        for node in ast.walk(tree)
        if unsafe(node) and not (path.relative_to(ROOT).as_posix() in TENSORS_ONLY and loads_tensors(node))
    ]
    assert not wrong, "\n".join(wrong)


def num_body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without signature and docstring: the options of a command are a list, not logic."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def test_files_and_functions_stay_small():
    wrong = []
    for path, tree in parsed().items():
        name = path.relative_to(ROOT).as_posix()
        lines = len(path.read_text().splitlines())
        if lines > 300 and name not in LONG_FILES:
            wrong.append(f"{name}: {lines} lines, at most 300")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or f"{name}::{node.name}" in LONG_FUNCTIONS:
                continue
            if num_body_lines(node) > 40:
                wrong.append(f"{name}:{node.lineno} {node.name}: {num_body_lines(node)} lines, at most 40")
    assert not wrong, "split by meaning, or list with a reason:\n" + "\n".join(wrong)


def test_names_mean_something():
    wrong = [path for path in parsed() if path.stem in {"utils", "helpers", "common", "misc", "manager", "base"}]
    assert not wrong, f"name the thing, not the drawer: {wrong}"
