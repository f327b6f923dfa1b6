"""Commands that make gates or move them: learnevict train and refine; push and pull; import, from published weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

import learnevict.cli.options as o
from learnevict.cli.eval import check_rows
from learnevict.cli.output import quieten, say, tell
from learnevict.data.sources import check_there
from learnevict.errors import DataError, UsageError
from learnevict.infer.model.catalogue import folder_of_gates, folder_of_model

Words = Annotated[list[str] | None, typer.Argument(metavar="[METHOD | CONFIG.YAML] [FLAGS]", show_default=False)]
OPTIONS: dict[str, Any] = {
    "gates": typer.Argument(metavar="FOLDER", help="Gates: a folder, or testbed-foresightkv and others that ship here."),
    "push.repo": typer.Argument(metavar="USER/REPO", help="Where to; made if it does not exist. user/repo@branch is fine "
        "too."),
    "private": o.option(None, "Make a new repository private.", "--private"),
    "push.revision": o.option(None, "Branch to commit to. [dim]main[/dim]", metavar="BRANCH"),
    "message": o.option(None, "Of the commit.", "--message", "-m"),
    "results": o.option("The card", "JSONL of `learnevict eval --out`, for the card; may be given again. The card "
        "shows rows of these very gates, and compares them with rows of other methods.", "--results", metavar="ROWS"),
    "pull.repo": typer.Argument(metavar="USER/REPO", help="Gates on the Hub; user/repo@revision is fine too."),
    "pull.revision": o.option(None, "Branch, tag or commit. [dim]main[/dim]", metavar="REVISION"),
    "pull.out": o.option(None, "Folder: new, empty, or pulled from there before. [dim]./REPO[/dim]", "--out", "-o"),
    "weights": typer.Argument(metavar="WEIGHTS", help="A file of published weights, or a folder that holds one."),
    "import_weights.out": o.option(o.OUTPUT, "Folder: new or empty.", "--out", "-o"),
    "allow_pickle": o.option(None, "Read weights that are pickles (.pt, .pth, .bin), of gates and model. Only if you "
        "trust who made them.", "--allow-pickle"),
    "method": o.option(None, "Where the gates are of a method of your own: its import path. None is imported "
        "otherwise.", metavar="MODULE"),
}  # fmt: skip


def train(words: Words = None) -> None:
    """Train the gates of a learned method; [bold]learnevict train METHOD --help[/bold] shows its flags."""
    _check_words(words or [])
    from learnevict.train.distill import main, parse

    main(parse(words or [], "learnevict train"))


def refine(words: Words = None) -> None:
    """Refine trained gates by reinforcement; [bold]learnevict refine --help[/bold] shows the flags."""
    _check_words(words or [], names_method=False)
    from learnevict.rl.refine import main, parse

    main(*parse(words or [], "learnevict refine"))


def _check_words(words: list[str], *, names_method: bool = True) -> None:
    """Refuses, before anything is imported, what a look at the words shows to be nowhere.

    Raises:
        UsageError: no such method, or no such file of flags.
        ModelError, GateError, DataError: no model, gates or texts of this name.
    """
    first = words[0] if words and not words[0].startswith("-") else ""
    if first.lower().endswith((".yaml", ".yml")):
        if not Path(first).is_file():
            raise UsageError(f"there is no file {first!r} of flags")
    elif first and names_method:
        o.check_method(first)
    checks: dict[str, Callable[[str], object]] = {
        "--method": o.check_method, "--model": folder_of_model, "--start_from": folder_of_gates, "--data": check_there,
    }  # fmt: skip
    given = [word for part in words for word in (part.split("=", 1) if part.startswith("--") else [part])]
    for name, value in pairwise(given):
        if name in checks and value and value != "testbed":
            checks[name](value)


def push(
    gates: str,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    method: str | None = None,
    results: list[Path] | None = None,
) -> None:
    """Share gates on the Hub: config.json, model.safetensors, run.json if there is one, and a model card, as one commit.

    Examples:

        learnevict push runs/foresightkv me/my-gates --private

        learnevict push runs/foresightkv me/my-gates --results rows.jsonl --message "with measurements"

        learnevict push testbed-foresightkv me/testbed-gates --results docs/results/main/program.jsonl

    Nothing else in the folder is sent, and of paths of this machine only the last part; the folder is only read. Log in
    with `hf auth login`, or set HF_TOKEN. If the connection breaks, give the same command again: what has arrived is not
    sent twice, and nothing shows before all of it is there. The card is made from the gates' record and from --results;
    without it, it says that nothing was measured. A README.md that you wrote yourself goes up as it is.
    """
    if method is not None:
        o.check_method(method)
    folder_of_gates(gates)
    check_rows(results or ())
    from learnevict.hub import push_folder

    rows = []
    if results:
        from learnevict.evals.records import read_rows

        rows = [row for path in results for row in read_rows(path)]
    quieten()
    pushed = push_folder(gates, repo, private=private, revision=revision, message=message, rows=rows)
    if not pushed.changed:
        say(f"{pushed.address} has all of it already; nothing was committed")
    else:
        kind = "a new repository" if pushed.created else "a new commit of a repository that exists"
        made = f"from {len(rows)} rows" if rows else "without measurements (--results gives some)"
        say(f"{', '.join(pushed.files)} in {pushed.address}: {kind}; card {made}")
    tell(pushed.url)


def pull(
    repo: str,
    revision: str | None = None,
    out: Path | None = None,
    method: str | None = None,
) -> None:
    """Bring gates from the Hub into a folder; `infer --ckpt FOLDER` then needs no network.

    Examples:

        learnevict pull me/my-gates

        learnevict pull me/my-gates --revision v1 --out gates-v1

    `infer --ckpt me/my-gates@v1` does without: it keeps what it fetches in the cache of the Hub. Which model the gates
    belong to is checked when they are used (--allow-other-base accepts another). The same command again brings a pulled
    folder up to date, or finishes a pull that broke off; what you changed in it is never overwritten.
    """
    if method is not None:
        o.check_method(method)
    from learnevict.hub import pull_folder

    quieten()
    pulled = pull_folder(repo, out, revision=revision)
    news = ", ".join(pulled.changed) if pulled.changed else "nothing new"
    say(f"{news} from {repo} at commit {pulled.commit[:8]}")
    tell(str(pulled.folder))


def import_weights(
    weights: str,
    model: str,
    out: Path,
    allow_pickle: bool = False,
    device: str = "cpu",
    dtype: o.Precision = o.Precision.auto,
) -> None:
    """Make gates from weights that the authors of KVzap, Fast KVzip, TRIM-KV or DBTrimKV published.

    Examples:

        hf download nvidia/KVzap-mlp-Qwen3-8B --local-dir KVzap-mlp-Qwen3-8B

        learnevict import KVzap-mlp-Qwen3-8B --model Qwen/Qwen3-8B --out gates

        learnevict import q4_dim16_sink16.pt --model Qwen/Qwen3-8B --out gates --allow-pickle

    `infer --ckpt gates` then opens them. The method is known by the names of the tensors, whose values are taken over exactly.
    --model is the model that they were trained on: its shape is checked, and its weights are what the gates belong to from
    then on. Pickles are read once, tensors only, and the result is safetensors.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{str(out)!r} exists already, and nothing is replaced; choose another --out")
    if not Path(weights).exists():
        raise DataError(
            f"there is no file or folder {weights!r}; download the weights first, for instance with `hf download`"
        )
    options = o.ModelOptions(model, device, dtype, allow_pickle)
    from learnevict.cli.opened_model import open_model
    from learnevict.hub import write_card
    from learnevict.hub.published import import_gates

    opened = open_model(options)
    gates = import_gates(weights, opened.model, allow_pickle=allow_pickle)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".import-") as draft:
        folder = Path(draft) / "gates"
        gates.save_pretrained(folder)
        write_card(folder, f"user/{re.sub(r'[^A-Za-z0-9_.-]+', '-', out.resolve().name).strip('-.') or 'gates'}")
        os.replace(folder, out)
    say(f"{gates.method}, {gates.num_parameters():,} parameters, for {gates.config.base_name}")
    tell(str(out))
