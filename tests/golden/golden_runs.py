"""Golden runs: losses and gradient norms of 20 training steps for every model case, memory policy and precision.

    python tests/golden/golden_runs.py             makes golden_runs.json anew
    python tests/golden/golden_runs.py cola bias   only these cases

A refactoring proves itself by leaving the file as it is. A change of numerics makes it anew, looks at the difference,
and says so in CHANGELOG.md.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from crosslayer.crnet.policies import POLICIES_OF
from model_cases import CASES, model_of, tokens

FILE = Path(__file__).with_suffix(".json")
STEPS, LENGTH, VOCABULARY = 20, 24, 37
PRECISIONS = ("float32", "mixed")


def run_names() -> list[str]:
    return [
        f"{case}/{policy}/{precision}" for case in CASES for policy in policies_of(case) for precision in PRECISIONS
    ]


def policies_of(case: str) -> tuple[str, ...]:
    return POLICIES_OF[CASES[case].get("factorization", "cross_layer")]


def golden_run(name: str) -> dict[str, list[float]]:
    """{"loss": ..., "gradient_norm": ...}, one number a step, of a run on one thread."""
    case, policy, precision = name.split("/")
    model = model_of(case, vocab_size=VOCABULARY, num_hidden_layers=4).train()
    if policy != "none":
        model.set_recompute(policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found: dict[str, list[float]] = {"loss": [], "gradient_norm": []}
    for step in range(STEPS):
        ids = tokens(rows=2, length=LENGTH, seed=step, vocab_size=VOCABULARY)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        found["loss"].append(loss.item())
        found["gradient_norm"].append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    return found


def machine() -> dict[str, str]:
    """What decides about the last bits."""
    return {"torch": torch.__version__.partition("+")[0], "processor": processor()}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="cases to run; all by default", metavar="CASE")
    chosen = parser.parse_args().cases or list(CASES)
    torch.set_num_threads(1)
    runs = json.loads(FILE.read_text())["runs"] if FILE.exists() else {}
    runs |= {name: golden_run(name) for name in run_names() if name.partition("/")[0] in chosen}
    content = {"machine": machine(), "runs": {name: runs[name] for name in run_names() if name in runs}}
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
