"""Gradient per block of LoR2C against LoRA, and SFS of every module, over one fine-tuning run of each.

    python benchmarks/lor2c_gradients.py --model FOLDER --task mrpc --data DIR
    python benchmarks/lor2c_gradients.py --pretrain TEXTS --task sst2 --data DIR --rows 8000 --epochs 1 \\
        --learning_rate 0.002 --max_length 64 --out benchmarks/results/lor2c_gradients_24.json

The second form makes its model first: a narrow Llama of 24 blocks, pre-trained on the texts in about five minutes of
one core, where gradients have far to go. Both methods see the same rows in the same order with the same rank and rate,
unclipped. Writes benchmarks/results/lor2c_gradients.json and two pictures beside it: the gradients with their ratio,
and SFS over steps.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from small_base import Base, describe, pretrained

DEEP = Base(
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=24,
    num_attention_heads=4,
    vocabulary=2048,
    block_size=128,
    steps=1000,
    bf16=False,
)


def run(method: str, options, callbacks: list) -> dict[str, float]:
    """Trains with the callbacks; what the evaluation at the end measured."""
    from crosslayer.train import build_finetune_recipe
    from crosslayer.train.finetune import train_once

    recipe = build_finetune_recipe(
        {
            "name": "lor2c_gradients",
            "model": str(options.model),
            "data": {
                "task": options.task,
                "data": None if options.data is None else str(options.data),
                "max_train_rows": options.rows,
                "max_length": options.max_length,
            },
            "adapter": {"method": method, "r": options.r},
            "training": {
                "num_train_epochs": options.epochs,
                "learning_rate": options.learning_rate,
                "max_grad_norm": 0.0,
                "seed": options.seed,
                "eval_strategy": "no",
                "disable_tqdm": True,
            },
        }
    )
    return train_once(recipe, callbacks).metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder, or a name on the hub")
    model.add_argument("--pretrain", help="a file of texts: make a small model of 24 blocks from it")
    parser.add_argument("--pretrain_steps", type=int, default=DEEP.steps, help="of 1,024 tokens each")
    parser.add_argument("--work", type=Path, default=Path("runs/lor2c_gradients"), help="of --pretrain")
    parser.add_argument("--task", default="mrpc")
    parser.add_argument("--data", type=Path, help="local folder of the task")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=10, help="steps between two looks at SFS")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lor2c_gradients.json")
    parser.add_argument("--smoke", action="store_true", help="--pretrain with a few steps")
    options = parser.parse_args()

    from crosslayer.analysis.adapters import GradientRecorder, SFSRecorder, draw_gradient_ratio, draw_sfs
    from crosslayer.cli.common import quiet_libraries
    from crosslayer.provenance import describe_run
    from crosslayer.train.run_folder import write_json
    from result_file import command_of, describe_model

    quiet_libraries()
    base = replace(DEEP, **({"vocabulary": 400, "steps": 4} if options.smoke else {"steps": options.pretrain_steps}))
    if options.pretrain is not None:
        options.model = str(pretrained(base, options.pretrain, options.work))
    recorders = {method: GradientRecorder() for method in ("lor2c", "lora")}
    sfs = SFSRecorder(options.every)
    metrics = {
        "lor2c": run("lor2c", options, [recorders["lor2c"], sfs]),
        "lora": run("lora", options, [recorders["lora"]]),
    }
    lor2c, lora = (recorders[method].mean() for method in ("lor2c", "lora"))
    settings = {name: str(value) for name, value in vars(options).items() if name in _SETTINGS}
    of_model = "--model MODEL" if options.pretrain is None else "--pretrain TEXTS"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        options.out,
        {
            "what": "root mean square of the adapter's gradient per block, mean over the steps",
            "model": describe_model(options.model)
            | ({} if options.pretrain is None else describe(base, Path(options.model))),
            "settings": settings,
            "run": describe_run(command_of("lor2c_gradients.py", settings, of_model)),
            "metrics": metrics,
            "gradient": {"lor2c": lor2c, "lora": lora},
            "gradient_by_step": {method: recorder.magnitudes for method, recorder in recorders.items()},
            "sfs": sfs.records,
        },
    )
    draw_gradient_ratio(options.out.with_suffix(".png"), lor2c, lora)
    draw_sfs(options.out.with_name(options.out.stem + "_sfs.png"), sfs.records)
    print("| block | LoR2C | LoRA | ratio |\n|---|---|---|---|")
    for block, (a, b) in enumerate(zip(lor2c, lora, strict=True)):
        print(f"| {block} | {a:.3e} | {b:.3e} | {a / b if b else float('nan'):.2f} |")


_SETTINGS = ("task", "rows", "max_length", "r", "epochs", "learning_rate", "seed")


if __name__ == "__main__":
    main()
