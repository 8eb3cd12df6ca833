"""LoR2C in PEFT's own comparison of methods: Llama-3.2-3B on MetaMathQA, tested on GSM8K.

    git clone https://github.com/huggingface/peft CHECKOUT
    pip install -r CHECKOUT/method_comparison/MetaMathQA/requirements.txt
    python benchmarks/metamathqa.py --peft CHECKOUT -v               # both ranks, one after the other
    python benchmarks/metamathqa.py --peft CHECKOUT --ranks 32 -v    # further options are run.py's own

Puts the experiments of benchmarks/metamathqa/ into the suite of the checkout and starts its run.py for each of them,
with the checkout's PEFT and with LoR2C registered first. What run.py needs, this needs: a CUDA device of 24 GB, the
hub's access to meta-llama/Llama-3.2-3B, and a checkout (it asks git for the branch of the PEFT that runs). Its results
go to CHECKOUT/method_comparison/MetaMathQA/results, or temporary_results on another branch than main.

    rank 32     5,505,024 trained parameters, as many as C3A there
    rank 53     9,117,696, just below LoRA of rank 32 on query and value, 9,175,040

Scaling 2 and dropout 0 are those of LoRA there; the learning rate 3e-4 is that of the paper's LLaMA script
(arXiv 2503.00572). Nothing was tuned.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).with_suffix("") / "experiments" / "lor2c"
RANKS = (32, 53)
START = (
    "import runpy, sys; import crosslayer.lor2c; sys.argv[0] = 'run.py'; runpy.run_path('run.py', run_name='__main__')"
)


def name_of(rank: int) -> str:
    """The experiment's folder."""
    return f"llama-3.2-3B-rank{rank}"


def install(suite: Path, rank: int) -> Path:
    """The experiment's folder below the suite, made or there already. Ends the program where it says something else."""
    source, target = EXPERIMENTS / name_of(rank), suite / "experiments" / "lor2c" / name_of(rank)
    for file in sorted(source.iterdir()):
        there = target / file.name
        if there.exists() and there.read_bytes() != file.read_bytes():
            sys.exit(f"{there} differs from {file}; rename its folder to keep it, or remove it")
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target


def run(suite: Path, peft: Path, experiment: Path, further: list[str]) -> int:
    """The exit status of run.py for one experiment."""
    source = Path(__file__).resolve().parents[1] / "src"
    paths = [str(peft.resolve() / "src"), str(source), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", START, *further, str(experiment.relative_to(suite))]
    return subprocess.run(command, cwd=suite, env=environment, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", type=Path, required=True, help="a git checkout of huggingface/peft")
    parser.add_argument("--ranks", type=int, nargs="+", choices=RANKS, default=list(RANKS))
    options, further = parser.parse_known_args()
    suite = options.peft / "method_comparison" / "MetaMathQA"
    if not (suite / "run.py").is_file():
        parser.error(f"{options.peft} has no method_comparison/MetaMathQA/run.py; give a checkout of huggingface/peft")
    experiments = [install(suite, rank) for rank in options.ranks]
    failed = [experiment.name for experiment in experiments if run(suite, options.peft, experiment, further) != 0]
    if failed:
        sys.exit(f"run.py failed for {', '.join(failed)}")


if __name__ == "__main__":
    main()
