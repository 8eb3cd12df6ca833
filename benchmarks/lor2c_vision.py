"""LoR2C and its variants against LoRA, full fine-tuning and the head alone on images: a small ViT, handwritten digits.

    python benchmarks/lor2c_vision.py

The digits are scikit-learn's own, 1,797 scanned images of 8 x 8 pixels. A ViT of 8 blocks learns to tell 0 to 4 apart,
and is then adapted, with a new head, to 5 to 9: 250 images, 100 steps of 32, the other 646 judge. Rates are searched
for each method as in lor2c_causal.py, with a seed of its own; then three seeds, which draw head, adapter and order. The
gradient of LoR2C in each block over LoRA's is of runs at one rate, unclipped like all of them. Every method is a
section of benchmarks/results/lor2c_vision.json; two pictures are drawn beside it. About ten minutes of one core.
"""

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from adapter_study import Runs, tune
from result_file import ResultFile

SHAPE = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_labels": 5,
}
FIRST_HALF, SECOND_HALF, TRAINING_IMAGES = range(5), range(5, 10), 250
PRETRAINING_STEPS, STEPS, BATCH_SIZE = 600, 100, 32
PRETRAINING_RATE = 1e-3
TUNING_SEED, SEEDS = 100, (0, 1, 2)
R, DROPOUT = 4, 0.05

METHODS = {
    "lor2c": R,
    "lora_same_r": R,
    "lora_same_parameters": R // 2,
    "full": None,
    "head": None,
    "injectlor2c": R,
    "sharelor2c": R,
    "mergelor2c": R,
    "imlor2c": R,
    "lora_first_block": R,
    "lora_later_blocks": R,
}
"""Method -> its rank. The last two ask where LoRA is needed."""

LORA_BLOCKS = {"lora_first_block": [0], "lora_later_blocks": list(range(1, SHAPE["num_hidden_layers"]))}

CENTRES = {"full": 1e-3, "head": 1.6e-2}
ADAPTER_CENTRE = 4e-3


def digits(classes: range) -> list[dict[str, Any]]:
    """The images of these classes in an order drawn once: {"pixel_values" [1, 8, 8] in [0, 1], "labels" from 0}."""
    import torch
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rows = [
        {"pixel_values": torch.tensor(image, dtype=torch.float32).view(1, 8, 8) / 16, "labels": label - classes[0]}
        for image, label in zip(images, labels.tolist(), strict=True)
        if label in classes
    ]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[place] for place in order]


def fit(model: Any, rows: list[dict], steps: int, rate: float, seed: int, work: Path, callbacks: list) -> None:
    from transformers import Trainer, TrainingArguments, default_data_collator

    arguments = TrainingArguments(
        output_dir=str(work / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=round(0.06 * steps),
        weight_decay=0.01,
        max_grad_norm=0.0,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=callbacks
    ).train()


def judge(model: Any, rows: list[dict]) -> dict[str, float | None]:
    """Loss and accuracy; no loss where it is not finite."""
    import torch

    model.eval()
    labels = torch.tensor([row["labels"] for row in rows])
    with torch.no_grad():
        logits = model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    return {"loss": round(loss, 5) if loss < float("inf") else None, "accuracy": accuracy}


def pretrained_vit(work: Path, steps: int) -> tuple[Path, dict[str, Any]]:
    """The folder of the ViT that knows 0 to 4, and its accuracy on images of them it has not seen."""
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    folder = work / "vit"
    rows = digits(FIRST_HALF)
    held_out, seen = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    if not folder.is_dir():
        set_seed(0)
        model = ViTForImageClassification(ViTConfig(**SHAPE))
        fit(model, seen, steps, PRETRAINING_RATE, 0, work, [])
        model.save_pretrained(work / "vit.tmp")
        (work / "vit.tmp").rename(folder)
    model = ViTForImageClassification.from_pretrained(folder)
    about = {"shape": SHAPE, "parameters": model.num_parameters(), "steps": steps, "rate": PRETRAINING_RATE}
    return folder, {**about, "images": len(seen), **judge(model, held_out)}


def adapted(folder: Path, method: str) -> tuple[Any, list]:
    """(the ViT with a new head, ready to train; the callbacks of the method). Draws from the generators."""
    from peft import LoraConfig, get_peft_model
    from transformers import ViTForImageClassification

    from crosslayer import LoR2CConfig, LoR2CStructureCallback
    from crosslayer.lor2c import lor2c_settings

    model = ViTForImageClassification.from_pretrained(folder)
    model.classifier.reset_parameters()
    if method == "full":
        return model, []
    if method == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        return model, []
    if method.startswith("lora"):
        config: Any = LoraConfig(
            r=METHODS[method],
            lora_alpha=16,
            lora_dropout=DROPOUT,
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=LORA_BLOCKS.get(method),
            modules_to_save=["classifier"],
        )
        return get_peft_model(model, config), []
    for_config, for_callback = lor2c_settings(method)
    if "max_injections" in for_callback:
        for_callback["max_injections"] = 2  # of 8 blocks, about the paper's 3 of 12
    config = LoR2CConfig(r=METHODS[method], lor2c_dropout=DROPOUT, modules_to_save=["classifier"], **for_config)
    callbacks = [LoR2CStructureCallback(**for_callback, interval_unit="steps")] if for_callback else []
    return get_peft_model(model, config), callbacks


def train(method: str, rate: float, seed: int, folder: Path, work: Path, steps: int, recorder: Any = None) -> dict:
    """One run on the second half of the digits."""
    from transformers import set_seed

    from crosslayer.train.methods import count_trained

    rows = digits(SECOND_HALF)
    set_seed(seed)
    model, callbacks = adapted(folder, method)
    started, wall = time.process_time(), time.perf_counter()
    recorders = [] if recorder is None else [recorder]
    fit(model, rows[:TRAINING_IMAGES], steps, rate, seed, work, [*callbacks, *recorders])
    return {
        "rate": rate,
        "seed": seed,
        **judge(model, rows[TRAINING_IMAGES:]),
        "trained": count_trained(model),
        "cpu_seconds": round(time.process_time() - started, 1),
        "seconds": round(time.perf_counter() - wall, 1),
    }


def measure_method(method: str, folder: Path, work: Path, steps: int) -> dict[str, Any]:
    """Its rate, then its seeds."""
    runs = Runs(work / "runs")

    def run(rate: float, seed: int) -> dict[str, Any]:
        return runs(f"{method}_{rate:g}_{seed}", partial(train, method, rate, seed, folder, work, steps))

    found = tune(lambda rate: run(rate, TUNING_SEED), CENTRES.get(method, ADAPTER_CENTRE))
    of_seeds = [run(found["rate"], seed) for seed in SEEDS]
    accuracies = [one["accuracy"] for one in of_seeds]
    return {
        **found,
        "r": METHODS[method],
        "trained": of_seeds[0]["trained"],
        "accuracies": accuracies,
        "accuracy": statistics.mean(accuracies),
        "accuracy_stdev": statistics.stdev(accuracies),
        "losses": [one["loss"] for one in of_seeds],
        "cpu_seconds": round(sum(one["cpu_seconds"] for one in of_seeds), 1),
    }


def measure_gradients(rate: float, folder: Path, work: Path, steps: int) -> dict[str, Any]:
    """Gradient per block of both methods at one rate: mean over steps and seeds, and the ratio of each seed."""
    from crosslayer.analysis.adapters import GradientRecorder

    means: dict[str, list[list[float]]] = {"lor2c": [], "lora_same_r": []}
    for method, of_seeds in means.items():
        for seed in SEEDS:
            recorder = GradientRecorder()
            train(method, rate, seed, folder, work, steps, recorder)
            of_seeds.append(recorder.mean())
    ratios = [
        [a / b for a, b in zip(*pair, strict=True)] for pair in zip(means["lor2c"], means["lora_same_r"], strict=True)
    ]
    mean = {method: [statistics.mean(block) for block in zip(*rows, strict=True)] for method, rows in means.items()}
    return {"rate": rate, "r": R, "gradient": mean, "ratios": ratios}


def print_tables(results: ResultFile) -> None:
    print("| method | trained without head | rate | accuracy (%) |\n|---|---|---|---|")
    for method in METHODS:
        if method in results:
            own = results[method]
            size = own["trained"]["adapter"] + own["trained"]["base"]
            print(
                f"| {method} | {size:,} | {own['rate']:g} | {100 * own['accuracy']:.1f} ± "
                f"{100 * own['accuracy_stdev']:.1f} |"
            )
    if "gradients" in results:
        own = results["gradients"]
        print("\n| block | LoR2C | LoRA | ratio, lowest to highest seed |\n|---|---|---|---|")
        for block, values in enumerate(zip(*own["ratios"], strict=True)):
            a, b = (own["gradient"][method][block] for method in ("lor2c", "lora_same_r"))
            print(f"| {block} | {a:.2e} | {b:.2e} | {a / b:.2f} ({min(values):.2f} to {max(values):.2f}) |")


def draw(results: ResultFile, path: Path) -> None:
    """Accuracy of every seed by method; the gradients beside it, in a file of their own."""
    from matplotlib.figure import Figure

    from crosslayer.analysis.adapters import draw_gradient_ratio

    methods = [method for method in METHODS if method in results]
    figure = Figure(figsize=(7.2, 3.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for place, method in enumerate(methods):
        values = [100 * accuracy for accuracy in results[method]["accuracies"]]
        axes.plot([place] * len(values), values, "o", alpha=0.5, color="C0")
        axes.plot(place, statistics.mean(values), "_", color="black", ms=16)
    axes.set_xticks(range(len(methods)), [method.replace("_", "\n") for method in methods], fontsize="x-small")
    axes.set_ylabel("accuracy on 5 to 9 (%), one dot a seed")
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path)
    if "gradients" in results:
        gradient = results["gradients"]["gradient"]
        draw_gradient_ratio(path.with_name(f"{path.stem}_gradients.png"), gradient["lor2c"], gradient["lora_same_r"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--work", type=Path, default=Path("runs/lor2c_vision"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lor2c_vision.json")
    parser.add_argument("--smoke", action="store_true", help="a few steps each")
    options = parser.parse_args()

    import torch

    from crosslayer.cli.common import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    options.work.mkdir(parents=True, exist_ok=True)
    pretraining_steps, steps = (4, 4) if options.smoke else (PRETRAINING_STEPS, STEPS)
    results = ResultFile(
        options.out,
        "adapters on a small ViT: digits 5 to 9 after 0 to 4",
        command="python benchmarks/lor2c_vision.py",
    )
    folder, about = pretrained_vit(options.work, pretraining_steps)
    results.section("base", lambda: {**about, "steps_of_adaptation": steps, "training_images": TRAINING_IMAGES})
    for method in options.methods:
        results.section(method, partial(measure_method, method, folder, options.work, steps))
    if "lor2c" in results:
        rate = results["lor2c"]["rate"]
        results.section("gradients", partial(measure_gradients, rate, folder, options.work, steps))
    print_tables(results)
    draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
