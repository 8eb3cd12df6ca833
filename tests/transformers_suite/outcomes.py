"""pytest plugin: the worst outcome of every test, its subtests among them, as JSON in TRANSFORMERS_SUITE_OUTCOMES."""

import json
import os

_ORDER = ("passed", "skipped", "failed")
_outcomes: dict[str, str] = {}


def pytest_runtest_logreport(report) -> None:
    where = report.nodeid.rpartition("::")
    name = f"{where[0].rpartition('::')[2]}::{where[2]}"
    if report.when == "call" or report.outcome != "passed":
        _outcomes[name] = max(_outcomes.get(name, "passed"), report.outcome, key=_ORDER.index)


def pytest_sessionfinish() -> None:
    with open(os.environ["TRANSFORMERS_SUITE_OUTCOMES"], "w") as file:
        json.dump(_outcomes, file, indent=1, sort_keys=True)
