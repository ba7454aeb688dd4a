"""What a test says of itself at once, on a GPU: a run that is cut off has no summary."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

# Phases of a test that take longer than this say how long.
LONG_S: Final = 20.0


class AsItHappens:
    """A plugin that prints failures, and what took long, of the tests in a folder."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._config, self._folder = config, folder

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path = (self._config.rootpath / report.nodeid.partition("::")[0]).resolve()
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None or not path.is_relative_to(self._folder):
            return
        if report.duration > LONG_S:
            terminal.write_line(f"  {report.when} took {report.duration:.0f} s: {report.nodeid}")
        if report.failed:
            terminal.write_line(f"  {report.when} failed: {report.nodeid}")
            terminal.write_line(report.longreprtext)
