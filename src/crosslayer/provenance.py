"""Where a number comes from: command, commit, versions and device, the same in every file of results."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TypedDict


class Provenance(TypedDict):
    """What it takes to repeat a number."""

    command: str | None
    crosslayer: str
    commit: str | None
    python: str
    versions: dict[str, str]
    device: str
    threads: int
    cpus: int | None


def describe_run(command: str | None = None) -> Provenance:
    """Command, versions and device of this process.

    Args:
        command: what was called; a command line of crosslayer is found by itself.
    """
    import torch  # not needed to import this file

    from . import __version__

    packages = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")
    return {
        "command": command or _command(),
        "crosslayer": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def _command() -> str | None:
    is_ours = Path(sys.argv[0]).stem == "crosslayer"
    return " ".join(["crosslayer", *sys.argv[1:]]) if is_ours else None


def script_command() -> str:
    """The command line of the Python script that runs."""
    return " ".join(["python", *sys.argv])


def _commit() -> str | None:
    """Commit of the checkout that this package runs from, "+" where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "errors.py")  # a package installed below someone else's checkout is not it
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: str) -> str:
    """What CUDA calls a device of its own, or the system its CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


__all__ = ["Provenance", "describe_run", "device_name", "script_command"]
