"""learnevict list: the methods."""

from __future__ import annotations

import json
from typing import Any

import learnevict.cli.options as o
from learnevict.cli.output import for_tables, tell


def run(as_json: o.AsJson = False) -> None:
    """List the eviction methods: what each is, where it comes from, whether its memory is bounded.

    Examples:

        learnevict list

        learnevict list --json
    """
    from learnevict import methods

    rows = [_describe(name, methods.load(name)) for name in methods.METHODS]
    if as_json:
        tell(json.dumps(rows, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table("method", "paper", "year", "kind", "memory", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        paper = row["title"] + (f" [dim]arXiv {row['arxiv']}[/dim]" if row["arxiv"] else "")
        table.add_row(row["name"], paper, str(row["year"]), row["kind"], "bounded" if row["bounded"] else "grows")
    for_tables().print(table)
    tell("\nAn import path of your own (my_package.my_method) works wherever a name does.")


def _describe(name: str, module: Any) -> dict[str, Any]:
    paper = module.PAPER
    described = {"name": name, "title": paper.title, "arxiv": paper.arxiv, "year": paper.year, "kind": paper.kind}
    return {**described, "summary": (module.__doc__ or "").strip().split("\n")[0], "bounded": name != "full"}
