"""The planner's answers, run: what it recommends under a limit of memory stays below it, and the next larger does not.

    python benchmarks/plan_limits.py

A small CR-Net, float32, AdamW, 16 sequences of 128 tokens in a step. For limits from plenty to hardly anything the plan
is made for a device with so much memory, 8 % of it in reserve as always, and the rates of the CPU of roofline.json.
Then its recommendation trains one step here, and every byte is counted (`measure_peak_memory`); so does the smallest
setting that the plan says does not fit. The limit is emulated: nothing stops a step that goes beyond it. Counts do not
depend on how busy the machine is.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from crosslayer.accounting.planner import Setting, make_plan
from crosslayer.analysis import measure_peak_memory
from crosslayer.bench.contenders import ChunkedLoss
from crosslayer.crnet import CRNetConfig, CRNetForCausalLM
from result_file import ResultFile

RESULTS = Path(__file__).parent / "results"
SHAPE = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 12, "rank": 64}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 128}
SMOKE_SHAPE = SHAPE | {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6, "rank": 16}
LIMITS_MB = (700, 500, 400, 300, 210, 190)
SMOKE_LIMITS_MB = (90, 40)
SEQUENCE, SEQUENCES = 128, 16


def run(config: CRNetConfig, setting: Setting) -> int:
    """Bytes at the peak of a step."""
    torch.manual_seed(0)
    model = CRNetForCausalLM(config).train()
    model.set_recompute(setting.policy, None if setting.policy == "none" else setting.interval)
    ids = torch.randint(config.vocab_size, (setting.micro_batch, SEQUENCE))
    return measure_peak_memory(ChunkedLoss(model), ids).total_bytes


def check(config: CRNetConfig, megabytes: int, device: Path) -> dict[str, Any]:
    """What is recommended under a limit and the next larger, as planned and as measured."""
    plan = make_plan(
        config,
        gpu_memory=megabytes * 1e6,
        device=str(device),
        sequence=SEQUENCE,
        tokens_per_step=SEQUENCES * SEQUENCE,
        micro_batch=SEQUENCES,
        precision="float32",
        beside=(),
    )
    settings = {"recommended": plan.recommended.setting}
    larger = min((s for s in plan.settings if not s.fits), key=lambda s: s.peak_bytes, default=None)
    if larger is not None:
        settings["next larger"] = larger
    found: dict[str, Any] = {"limit_bytes": megabytes * 10**6, "usable_bytes": round(plan.usable_bytes)}
    for name, setting in settings.items():
        peak = run(config, setting)
        found[name] = {"label": setting.label, "planned_bytes": setting.peak_bytes, "measured_bytes": peak}
    fits = found["recommended"]["measured_bytes"] <= found["limit_bytes"]
    return {**found, "holds": fits and (larger is None or peak > found["usable_bytes"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model under two limits")
    parser.add_argument("--redo", action="store_true", help="measure again what is in the file")
    parser.add_argument("--out", type=Path, default=RESULTS / "plan_limits.json")
    options = parser.parse_args()
    results = ResultFile(options.out, "peak memory of what `plan` recommends under a limit", redo=options.redo)
    config = CRNetConfig(**(SMOKE_SHAPE if options.smoke else SHAPE))
    results.content["shape"] = SMOKE_SHAPE if options.smoke else SHAPE
    rows = ["| limit, MB | recommended | planned | measured | next larger | planned | measured | |", "|---" * 8 + "|"]
    with tempfile.TemporaryDirectory() as folder:
        device = Path(folder) / "device.json"
        rates = json.loads((RESULTS / "roofline.json").read_text())["sections"]["float32 h256"]["rates"]
        device.write_text(json.dumps(rates))
        for limit in SMOKE_LIMITS_MB if options.smoke else LIMITS_MB:
            row = results.section(f"{limit} MB", lambda limit=limit: check(config, limit, device))
            cells = [f"{limit:,}"]
            for each in (row["recommended"], row.get("next larger")):
                bytes_of = ("planned_bytes", "measured_bytes")
                cells += [each["label"], *(f"{each[x] / 1e6:,.1f}" for x in bytes_of)] if each else ["none", "", ""]
            rows.append(f"| {' | '.join(cells)} | {'holds' if row['holds'] else 'does not hold'} |")
    print("\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
