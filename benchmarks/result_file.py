"""One JSON of results, section by section: what is there is not measured again, and a file is never half written."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ResultFile:
    """{"what": ..., "sections": {name: {"run": ..., "seconds": ..., ...what was measured}}}.

    `command` stands for the command line where that names folders of this machine.
    """

    def __init__(self, path: Path, what: str, *, redo: bool = False, command: str | None = None) -> None:
        self.path, self.redo, self.command = path, redo, command
        known = json.loads(path.read_text()) if path.is_file() else {}
        self.content: dict[str, Any] = {**known, "what": what, "sections": known.get("sections", {})}

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.content["sections"][name]

    def __contains__(self, name: str) -> bool:
        return name in self.content["sections"]

    def section(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` returns, from the file if it is there."""
        if name in self and not self.redo:
            print(f"{name}: there already (--redo measures again)")
            return self[name]
        from crosslayer.provenance import describe_run, script_command  # slow to import, and not needed to read

        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        found = measure()
        run = describe_run(self.command or script_command())
        self.content["sections"][name] = {**found, "seconds": round(time.perf_counter() - started, 1), "run": run}
        self.save()
        return self[name]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(unfinished, self.path)


def describe_model(model: str) -> dict[str, str]:
    """Which model a figure is of: the sha256 of its weights where it is a local folder, whose path says nothing."""
    weights = Path(model) / "model.safetensors"
    if not weights.is_file():
        return {"name": model}
    with weights.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def command_of(script: str, settings: dict[str, str], of_model: str = "--model MODEL") -> str:
    """The command line of a run with these settings, folders by their options' names."""
    given = [f"--{name} {value}" for name, value in settings.items() if value != "None"]
    return " ".join(["python", f"benchmarks/{script}", of_model, "--data DATA", *given])
