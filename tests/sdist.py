"""Tests that other projects ship in their source distributions, for the suites that run them on ours."""

import subprocess
import sys
import tarfile
from pathlib import Path


def unpacked(package: str, requirements: Path, folder: Path) -> Path:
    """The unpacked source distribution of a package, checked against its hash when it is fetched into `folder`."""
    found = sorted(folder.glob(f"{package}-*/tests"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--no-binary", package, "--require-hashes", "--no-build-isolation", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirements)]
        subprocess.run([*command, "--dest", str(folder)], check=True)
        with tarfile.open(next(folder.glob(f"{package}-*.tar.gz"))) as archive:
            safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4
            archive.extractall(folder, **safely)
        found = sorted(folder.glob(f"{package}-*/tests"))
        (found[-1] / "__init__.py").touch()  # left out of the distribution; its tests import one another
    return found[-1].parent
