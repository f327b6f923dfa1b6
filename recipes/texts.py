"""Free English prose as documents to learn from, others to evaluate on, and one long text to hide needles in.

    python recipes/texts.py --source python --out runs/texts/python       # chapters of Python's reference; every Python has it
    python recipes/texts.py --source jargon --out runs/texts/jargon       # the Jargon File; public domain
    python recipes/texts.py --source handbook --out runs/texts/handbook   # Debian's handbook; CC-BY-SA-3.0
    python recipes/distill.py --model smollm2 --data runs/texts/jargon/train.jsonl --method kvzap

Into --out go train.jsonl, test.jsonl (each fifth document) and text.txt (those of test.jsonl as one text). The last two sources
are packages of Debian: an installed one is read, another is downloaded with apt-get and unpacked, not installed.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

from learnevict.errors import DataError, UsageError, told_in_one_line
from learnevict.files import replacing_folder
from learnevict.train.run.flags import check_fields, flag, read_flags

PACKAGES = {
    "jargon": ("jargon-text", "jargon.txt.gz"),
    "handbook": ("debian-handbook", "html/en-US/*.html"),
}
"""Package of Debian, and files below /usr/share/doc/PACKAGE."""
FILES = ("train.jsonl", "test.jsonl", "text.txt")
MARK = b'{"text": '


@dataclass(frozen=True)
class Config:
    """Flags of this program."""

    source: str = flag("python", f"python, {', '.join(PACKAGES)}")
    out: str = flag("runs/texts/python", "a folder")
    characters: int = flag(12_000, "of a document at least; the last may have fewer")
    smoke: bool = flag(False, "seconds, the same code")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.source not in ("python", *PACKAGES):
            raise UsageError(f"no text is called {self.source!r}; choose from python, {', '.join(PACKAGES)}")


class Prose(HTMLParser):
    """Collects the paragraphs, headings and listings of a page of DocBook, without menus and tables of contents."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.open: list[bool] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("br", "hr", "img", "input", "link", "meta"):  # these are never closed
            self.open.append(tag in ("p", "pre", "h1", "h2", "h3") or ("class", "para") in attrs)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open.pop():
            self.parts.append("\n\n")

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """Passes over <br/>."""

    def handle_data(self, data: str) -> None:
        if any(self.open):
            self.parts.append(data)


def main(config: Config) -> None:
    """Writes the documents of a source.

    Raises:
        DataError: a package cannot be had, or the folder holds something else.
    """
    text = "\n\n".join(topics.values()) if config.source == "python" else read_package(*PACKAGES[config.source])
    documents = cut(text[:100_000] if config.smoke else text, config.characters)
    test = documents[4::5] or documents[-1:]
    train = [one for one in documents if one not in test]
    out = Path(config.out)
    with replacing_folder(out, FILES, "train.jsonl", MARK) as fresh:
        for name, some in (("train.jsonl", train), ("test.jsonl", test)):
            lines = [json.dumps({"text": one}, ensure_ascii=False) + "\n" for one in some]
            (fresh / name).write_text("".join(lines), encoding="utf-8")
        (fresh / "text.txt").write_text("\n\n".join(test), encoding="utf-8")
    print(f"{len(train)} documents to learn from and {len(test)} others, {len(text):,} characters: {out}")


def cut(text: str, least: int) -> list[str]:
    """Returns a text in documents that end with a paragraph; runs of empty lines count as one."""
    documents, paragraphs, size = [], [], 0
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        paragraphs.append(paragraph.rstrip())
        size += len(paragraph)
        if size >= least:
            documents.append("\n\n".join(paragraphs))
            paragraphs, size = [], 0
    return documents + ["\n\n".join(paragraphs)] * bool(paragraphs)


def read_package(package: str, pattern: str) -> str:
    """Returns the text of a Debian package, installed or not.

    Raises:
        DataError: it is not installed, and apt-get cannot download it.
    """
    inside = Path("usr/share/doc") / package
    if files := sorted(("/" / inside).glob(pattern)):
        return read_files(files)
    with TemporaryDirectory() as folder:
        try:
            subprocess.run(
                ["apt-get", "download", "-q", package], cwd=folder, check=True, capture_output=True, text=True
            )
            (archive,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", str(archive), folder], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
            raise DataError(
                f"cannot download Debian's package {package} ({said}); take --source python, or any text file of your own"
            ) from error
        return read_files(sorted((Path(folder) / inside).glob(pattern)))


def read_files(files: Sequence[Path]) -> str:
    """Returns the prose of files, one after the other."""
    found = []
    for path in files:
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
        if path.suffix == ".html":
            page = Prose()
            page.feed(text)
            text = re.sub(r"(?m)^\t+", "", "".join(page.parts))
        found.append(text)
    return "\n\n".join(found)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Returns the settings that a command line asks for."""
    return read_flags({"options": Config}, arguments, __doc__, smoke={"out": "runs/texts-smoke"}).of(Config)


if __name__ == "__main__":
    with told_in_one_line("run the same command again"):
        main(parse())
