"""PEFT's own test-suite on LoR2C, from nothing: fetches PEFT's source distribution and runs its tests here.

python tests/peft_suite/run.py [--folder build/peft_suite] [decoder feature seq_classifier custom] [-- pytest options]
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from sdist import unpacked  # noqa: E402

SUITES = {
    "decoder": "test_decoder_models.py",
    "feature": "test_feature_extraction_models.py",
    "seq_classifier": "test_seq_classifier.py",
    "custom": "test_custom_models.py",
}


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
    root = unpacked("peft", HERE / "requirements.txt", folder)
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
