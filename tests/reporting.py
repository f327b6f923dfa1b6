"""Two things a green line does not say: which laws really evicted something, and which tests did not run.

Both work under pytest-xdist: cells travel on the test reports, and only the controller prints.
"""

from __future__ import annotations

from collections import defaultdict
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

LAWS = ("bounded", "identity", "masking", "padding", "isolation", "gone", "guarded", "save and load", "determinism")


class Recorder:
    """Notes cells of the law matrix on the running test."""

    def __init__(self, node: pytest.Item) -> None:
        self._properties = node.user_properties

    def record(self, law: str, method: str, model: str, evictions: int) -> None:
        """One case of a law: how many slots were evicted while it was checked (0 where nothing may be)."""
        self._properties.append(("law", (law, method, model, int(evictions))))


class LawMatrix:
    """Adds up the cells of passed tests: law x method x model -> slots evicted while the law was checked."""

    def __init__(self) -> None:
        self._evictions: dict[tuple[str, str, str], int] = defaultdict(int)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or not report.passed:
            return
        for name, value in report.user_properties:
            if name == "law":
                law, method, model, evictions = value
                self._evictions[law, method, model] += evictions

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._evictions:
            return
        seen = {law for law, _, _ in self._evictions}
        for law in [*(law for law in LAWS if law in seen), *sorted(seen - set(LAWS))]:
            terminalreporter.section(f"law {law!r}: slots evicted, method x model")
            for line in self.table(law):
                terminalreporter.write_line(line)

    def table(self, law: str) -> list[str]:
        """One law: methods down, models across; a dot where this run did not check the pair."""
        cells = {(method, model): count for (name, method, model), count in self._evictions.items() if name == law}
        models = sorted({model for _, model in cells})
        lines = [["method", *models]]
        for method in sorted({method for method, _ in cells}):
            lines.append([method, *(str(cells.get((method, model), ".")) for model in models)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]


class SkipRule:
    """Fails the run on a skipped (or expected-to-fail) test that no line `pattern | reason` of the file names."""

    def __init__(self, listing: Path) -> None:
        lines = [line.partition("#")[0].strip() for line in listing.read_text().splitlines()]
        # Brackets in a node id are its parameters, not a character class.
        self._patterns = [line.partition("|")[0].strip().replace("[", "[[]") for line in lines if line]
        self._listing = listing.name
        self._offenders: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._look_at(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._look_at(report)

    def _look_at(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not any(fnmatchcase(report.nodeid, pattern) for pattern in self._patterns):
            self._offenders.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._offenders and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._offenders:
            terminalreporter.section("skips that are not allowed")
            for nodeid in self._offenders:
                terminalreporter.write_line(
                    f"{nodeid}: run it, or list it in tests/{self._listing} with a reason", red=True
                )
