"""transformers' own common model tests on our models, from nothing, beside the model that each family is made from.

python tests/transformers_suite/run.py [--folder build/transformers_suite] [--tests FOLDER] [llama qwen3 ...] [-- -k x]

Fails where ours fails a test that theirs passes, unless `KNOWN` says why. The source distribution holds the common
model tests (`ModelTesterMixin`) but not those of generation; a checkout's `tests` folder, given as --tests, has both.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from sdist import unpacked  # noqa: E402

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "qwen3_moe_dense_first", "deepseek_v3", "cohere")
NOT_SHIPPED = {"generation/test_utils.py": "GenerationTesterMixin", "exporters/test_export.py": "ExportTesterMixin"}

KNOWN = {
    "test_training_gradient_checkpointing": (
        "it counts runs of torch's checkpoint function; our policies rebuild activations without it "
        "(tests/parity/test_memory_policies.py compares the gradients)"
    ),
    **dict.fromkeys(
        ("test_can_load_from_already_mapped_keys", "test_reverse_loading_mapping"),
        "there is no checkpoint of ours in an older layout that would have to be converted",
    ),
    "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": (
        "it asks the signature for output_attentions, which Cohere's names and ours, as Llama's, takes unnamed"
    ),
    "test_moe_models_record_router_logits": (
        "it looks for a decorator in the file of the model; tests/parity/test_mixtures.py compares router logits"
    ),
}
"""Beginning of a test's name -> why ours cannot pass it."""


def main() -> int:
    arguments, rest = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, rest = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], help="default: all")
    parser.add_argument("--folder", type=Path, default=Path("build/transformers_suite"))
    parser.add_argument("--tests", type=Path, help="the tests folder of a checkout of transformers")
    options = parser.parse_args(arguments)
    folder, families = options.folder.resolve(), options.families or FAMILIES
    root = options.tests.resolve().parent if options.tests else sources(folder)
    install_what_they_import(folder / "site")
    outcomes = folder / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    paths = [root, HERE, HERE.parent, folder / "site", os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TRANSFORMERS_SUITE_FAMILIES": ",".join(families),
        "TRANSFORMERS_SUITE_OUTCOMES": str(outcomes),
        "HF_HUB_OFFLINE": "1",
    }
    settings = ["-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "-p", "outcomes"]
    quiet = ["--quiet", "--tb=short", "--disable-warnings", "--timeout=300"]
    command = [sys.executable, "-m", "pytest", *settings, *quiet, str(HERE / "suite_of_models.py"), *rest]
    subprocess.run(command, cwd=root, env=environment)
    if not outcomes.is_file():
        return 1
    return compare(json.loads(outcomes.read_text()), families)


def sources(folder: Path) -> Path:
    """The source distribution, with empty classes in place of the modules that it lacks."""
    root = unpacked("transformers", HERE / "requirements.txt", folder)
    for name, mixin in NOT_SHIPPED.items():
        path = root / "tests" / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        if not path.is_file():
            path.write_text(f"class {mixin}:\n    pass\n")
    return root


def install_what_they_import(folder: Path) -> None:
    if folder.is_dir():
        return
    options = ["--quiet", "--no-deps", "--require-hashes", "--target", str(folder)]
    requirements = ["--requirement", str(HERE / "requirements_of_tests.txt")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *requirements], check=True)


def compare(outcomes: dict[str, str], families: tuple[str, ...]) -> int:
    """Prints a line for each family and each difference; 1 where one is not among those known."""
    wrong = []
    for family in families:
        sides = [
            {
                name.partition("::")[2]: found
                for name, found in outcomes.items()
                if name.startswith(f"{side}_{family}::")
            }
            for side in ("ours", "theirs")
        ]
        ours, theirs = sides
        counts = [[list(side.values()).count(kind) for kind in ("passed", "failed", "skipped")] for side in sides]
        print(f"{family:24s} ours {counts[0]}, theirs {counts[1]} (passed, failed, skipped)")
        for test in sorted(theirs):
            if theirs[test] != "passed" or ours.get(test) == "passed":
                continue
            reason = next((why for name, why in KNOWN.items() if test.startswith(name)), None)
            print(f"  {test}: theirs passed, ours {ours.get(test)}; {reason or 'NOT KNOWN'}")
            if reason is None:
                wrong.append(f"{family}::{test}")
    print(f"{len(wrong)} differences that are not known" if wrong else "no difference that is not known")
    return int(bool(wrong) or not outcomes)


if __name__ == "__main__":
    sys.exit(main())
