"""The folder of a run: whether it may be written, what it says about itself, and what it took to run.

output_dir/
  recipe.yaml        the recipe as it ran          run.json       command, versions, device, plan
"""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..provenance import describe_run

RECIPE_FILE, RUN_FILE = "recipe.yaml", "run.json"
_UNFINISHED = {f"{name}.tmp" for name in (RECIPE_FILE, RUN_FILE)}  # all that a run killed at its start leaves


def is_main_process() -> bool:
    """True in a single process and in the first of a distributed launch."""
    return int(os.environ.get("RANK", "0")) == 0


def check_output_dir(output_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises CheckpointError for a folder that a run must not write into, ConfigError for resume with overwrite."""
    holds_run = (output_dir / RUN_FILE).is_file()
    is_empty = not output_dir.exists() or (output_dir.is_dir() and {*os.listdir(output_dir)} <= _UNFINISHED)
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one of them")
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError(f"{output_dir} is a file; give a folder as --output_dir")
    if resume and not holds_run:
        raise CheckpointError(f"{output_dir} holds no run to resume; leave --resume out to start one")
    if is_empty or (holds_run and (resume or overwrite)):
        return
    if holds_run:
        raise CheckpointError(
            f"{output_dir} already holds a run; give --resume to go on, --overwrite to throw it away, or another "
            "--output_dir"
        )
    raise CheckpointError(
        f"{output_dir} holds files that are not of a run and would not be touched; give another --output_dir"
    )


def prepare_output_dir(
    output_dir: Path, recipe: Any, plan: Any, fingerprints: dict[str, str], *, overwrite: bool
) -> None:
    """Make the folder and write recipe.yaml and run.json into it; `recipe` saves itself, `plan` is a dataclass,
    `fingerprints` say what the run reads (resume.py).

    Raises CheckpointError when it cannot be written. Ended at any moment, it leaves a folder that can be written again.
    """
    content = {**describe_run(), "plan": asdict(plan), "fingerprints": fingerprints}
    written = output_dir / f"{RECIPE_FILE}.tmp"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _empty(output_dir)
        recipe.save(written)
        write_json(output_dir / RUN_FILE, content)  # from here on it is a run
        written.replace(output_dir / RECIPE_FILE)
    except OSError as error:
        raise CheckpointError(f"{output_dir} cannot be written: {error.strerror}; choose another folder") from None


def _empty(output_dir: Path) -> None:
    """Throw away a run but for what says that it is one."""
    for entry in output_dir.iterdir():
        if entry.name == RUN_FILE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes allocated on the CUDA device, or the largest resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_json(path: Path, content: Any) -> None:
    """JSON under a temporary name, then renamed: there is never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """What a JSON file holds, None when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
