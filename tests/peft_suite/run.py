"""PEFT's own test-suite on LoR2C, from nothing: fetches PEFT's source distribution and runs its tests here.

python tests/peft_suite/run.py [--folder build/peft_suite] [decoder feature seq_classifier custom] [-- pytest options]
"""

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUITES = {
    "decoder": "test_decoder_models.py",
    "feature": "test_feature_extraction_models.py",
    "seq_classifier": "test_seq_classifier.py",
    "custom": "test_custom_models.py",
}


def sources(folder: Path) -> Path:
    """The unpacked source distribution, checked against its hash when it is fetched."""
    found = sorted(folder.glob("peft-*/tests"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--no-binary", "peft", "--require-hashes", "--no-build-isolation", "--quiet"]
        requirements = ["--requirement", str(HERE / "requirements.txt")]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, *requirements, "--dest", folder], check=True)
        with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
            safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4
            archive.extractall(folder, **safely)
        found = sorted(folder.glob("peft-*/tests"))
        (found[-1] / "__init__.py").touch()  # left out of the distribution; its tests import one another
    return found[-1].parent


def main() -> int:
    arguments, rest = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, rest = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="default: all four")
    parser.add_argument("--folder", type=Path, default=Path("build/peft_suite"))
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    root = sources(folder)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "PEFT_SUITE_MODELS": str(folder / "models"),
        "HF_HUB_OFFLINE": "1",
    }
    # PEFT's package stays the installed one: the sources below have their own under src/, which is not on the path.
    files = [f"tests/{SUITES[name]}" for name in options.suites or SUITES]
    # Its own settings turn deprecations into errors, and newer versions of transformers deprecate what PEFT uses.
    settings = ["-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "lor2c_in_peft_suite", *settings, *files, *rest]
    return subprocess.run(command, cwd=root, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
