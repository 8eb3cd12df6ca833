"""LoR2C and its variants against LoRA, DoRA, rsLoRA, SHADOW and full fine-tuning, on a causal language model.

    python benchmarks/lor2c_causal.py --texts openstax.jsonl.gz --gsm8k gsm8k.jsonl.gz --instructions alpaca.jsonl.gz

The base is a dense Llama of 7.4M parameters that the script pre-trains on the textbooks first (about a quarter of an
hour of one core; --work keeps it). It is adapted to three kinds of text: GSM8K's questions with their answers,
Alpaca-style instructions (the loss is over the answers), and the sources of Python's standard library. Every run takes
the same 125 steps of 8 rows of 128 tokens in the same order; a seed draws the order and the adapter. For each method
three learning rates a factor of four apart are tried on GSM8K with a seed of its own, and more while the best is at an
edge; the best one runs on the three texts with three seeds. What counts is bits per byte of held-out text after the
last step, noted every 25 steps as well. Every run is a file in the work folder and every method on a text a section of
benchmarks/results/lor2c_causal.json, so that the script goes on where it stopped; --table and --png show what there is.
"""

import argparse
import gzip
import json
import math
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from adapter_study import Runs, tune
from result_file import ResultFile
from small_base import Base, describe, pretrained

BASE = Base(
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=8,
    num_attention_heads=4,
    vocabulary=4096,
    block_size=256,
    steps=1250,
    bf16=True,
)
SMOKE_BASE = replace(BASE, hidden_size=32, intermediate_size=48, vocabulary=400, block_size=64, steps=4)
TEXTS = ("gsm8k", "instructions", "python")
TUNING_TEXT, TUNING_SEED, SEEDS = "gsm8k", 100, (0, 1, 2)
PYTHON_BYTES = 3_000_000
"""Of the standard library, whole files in an order drawn once: many times what a run reads."""

LORA = {"target_modules": ["q_proj", "v_proj"]}
STRUCTURE = {"interval_unit": "steps"}
METHODS: dict[str, dict[str, Any]] = {
    "lor2c": {"method": "lor2c", "r": 8},
    "lora_same_r": {"method": "lora", "r": 8, **LORA},
    "lora_same_parameters": {"method": "lora", "r": 4, **LORA},
    "injectlor2c": {"method": "injectlor2c", "r": 8, "max_injections": 2, **STRUCTURE},
    "full": {"method": "full"},
    "sharelor2c": {"method": "sharelor2c", "r": 8},
    "mergelor2c": {"method": "mergelor2c", "r": 8, "max_fuses": 1, **STRUCTURE},
    "imlor2c": {"method": "imlor2c", "r": 8, "max_fuses": 1, "max_injections": 2, **STRUCTURE},
    "dora": {"method": "dora", "r": 8},
    "rslora": {"method": "rslora", "r": 8},
    "shadow": {"method": "shadow", "r": 2},
}
"""As AdapterConfig reads them; dora, rslora and shadow are PEFT's own (`of_peft`)."""

SHADOW_WIDTH = 8
CENTRES = {"full": 4e-4}
ADAPTER_CENTRE = 4e-3
DROPOUT = 0.05  # the paper's for LLaMA


@dataclass(frozen=True)
class Length:
    """How long a run is, and what it is judged on."""

    steps: int = 125
    batch_size: int = 8
    tokens: int = 128
    every: int = 25
    validation_rows: int = 64


LENGTH, SMOKE_LENGTH = Length(), Length(steps=4, batch_size=2, tokens=64, every=2, validation_rows=4)


class Texts:
    """The rows of each text, tokenised once: {"input_ids", "attention_mask", "labels"}, all of one length."""

    def __init__(self, options, tokenizer: Any, length: Length) -> None:
        self.options, self.tokenizer, self.length = options, tokenizer, length
        self._known: dict[str, tuple[list, list]] = {}
        special = set(tokenizer.all_special_ids)
        names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.bytes_of = [0 if token in special else len(name) for token, name in enumerate(names)]
        """Of each token: the name of one of a byte-level BPE has a character for every byte."""

    def __getitem__(self, text: str) -> tuple[list, list]:
        """(training rows, held-out rows), the same for all runs; the two share no document."""
        if text not in self._known:
            documents = getattr(self, f"_{text}")()
            random.Random(0).shuffle(documents)
            rows = self._answered if text == "instructions" else self._packed
            held_out = max(1, len(documents) // 10)
            validation = rows(documents[:held_out])
            some = random.Random(1).sample(validation, min(self.length.validation_rows, len(validation)))
            self._known[text] = rows(documents[held_out:]), some
        return self._known[text]

    def _gsm8k(self) -> list[str]:
        rows = read_json_lines(self.options.gsm8k)
        return [f"Question: {row['question']}\nAnswer: {row['answer']}\n" for row in rows]

    def _python(self) -> list[str]:
        from crosslayer.data import DataConfig
        from crosslayer.data.sources import open_source

        documents = open_source(DataConfig(cache_dir=str(self.options.work / "cache"))).read().dataset["text"]
        documents = random.Random(0).sample(list(documents), len(documents))
        sizes = [len(text) for text in documents]
        most = PYTHON_BYTES // (10 if self.options.smoke else 1)
        return [text for place, text in enumerate(documents) if sum(sizes[: place + 1]) <= most]

    def _instructions(self) -> list[tuple[str, str]]:
        from crosslayer.data.instructions import prompt_of

        rows = read_json_lines(self.options.instructions)
        return [(prompt_of(row["instruction"], row.get("input", "")), row["output"]) for row in rows if row["output"]]

    def _packed(self, documents: list[str]) -> list[dict[str, list[int]]]:
        """Documents one after another, cut so that every token but the first is predicted once."""
        end = self.tokenizer.eos_token_id
        encoded = self.tokenizer(documents, add_special_tokens=False).input_ids
        stream = [token for ids in encoded for token in [*ids, end]]
        size = self.length.tokens
        blocks = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size - 1)]
        return [{"input_ids": ids, "attention_mask": [1] * size, "labels": ids} for ids in blocks]

    def _answered(self, pairs: list[tuple[str, str]]) -> list[dict[str, list[int]]]:
        """A prompt and its answer each, cut or filled up; only answers are predicted. Long prompts are left out."""
        size, pad, end = self.length.tokens, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        rows = []
        for prompt, answer in pairs:
            given, wanted = (self.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer))
            if len(given) > size * 3 // 4:
                continue
            ids = [*given, *wanted, end][:size]
            labels = [-100] * len(given) + ids[len(given) :]
            fill = size - len(ids)
            rows.append(
                {
                    "input_ids": ids + [pad] * fill,
                    "attention_mask": [1] * len(ids) + [0] * fill,
                    "labels": labels + [-100] * fill,
                }
            )
        return rows


def read_json_lines(path: Path) -> list[dict]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def adapted(folder: Path, adapter: dict[str, Any]) -> Any:
    """The base made ready to train (`crosslayer.train.methods.Attached`)."""
    import torch
    from transformers import AutoModelForCausalLM

    from crosslayer.train.methods import AdapterConfig, Attached, attach

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter["method"] in ("dora", "rslora", "shadow"):
        return Attached(of_peft(model, adapter))
    dropout = {} if adapter["method"] == "full" else {"dropout": DROPOUT}
    return attach(model, AdapterConfig(**adapter, **dropout), "instruction")


def of_peft(model: Any, adapter: dict[str, Any]) -> Any:
    """What PEFT has beside LoRA. SHADOW with as narrow a shadow as brings it near the others' parameters."""
    from peft import LoraConfig, ShadowConfig, get_peft_model

    if adapter["method"] == "shadow":
        config: Any = ShadowConfig(
            task_type="CAUSAL_LM",
            r=adapter["r"],
            shadow_dropout=DROPOUT,
            shadow_hidden_size=SHADOW_WIDTH,
            shadow_intermediate_size=2 * SHADOW_WIDTH,
        )
    else:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=adapter["r"],
            lora_alpha=16,
            lora_dropout=DROPOUT,
            use_dora=adapter["method"] == "dora",
            use_rslora=adapter["method"] == "rslora",
            **LORA,
        )
    return get_peft_model(model, config)


def bits_per_byte(model: Any, rows: list[dict], bytes_of: list[int], batch_size: int = 32) -> float:
    """Of the predicted tokens of all rows; the end of a document costs bits and has no bytes.

    The model is left in the mode it was in.
    """
    import torch

    was_training = model.training
    model.eval()
    nats, size = 0.0, 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids, mask, labels = (
            torch.tensor([r[name] for r in part]) for name in ("input_ids", "attention_mask", "labels")
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask).logits
        nats += torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).item()
        size += sum(bytes_of[token] for row in labels[:, 1:].tolist() for token in row if token != -100)
    model.train(was_training)
    return nats / math.log(2) / size


def train(method: str, text: str, rate: float, seed: int, folder: Path, texts: Texts) -> dict[str, Any]:
    """One run: its curve {"step": bits per byte}, None from where it was not finite."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator, set_seed

    length = texts.length
    rows, validation = texts[text]

    class Curve(TrainerCallback):
        def __init__(self) -> None:
            self.points: dict[int, float | None] = {}

        def note(self, step: int, model: Any) -> None:
            value = bits_per_byte(model, validation, texts.bytes_of)
            self.points[step] = round(value, 5) if math.isfinite(value) else None

        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            if state.global_step % length.every == 0:
                self.note(state.global_step, model)
                control.should_training_stop |= self.points[state.global_step] is None

    torch.set_num_threads(1)
    set_seed(seed)
    attached = adapted(folder, METHODS[method])
    curve = Curve()
    curve.note(0, attached.model)
    arguments = TrainingArguments(
        output_dir=str(texts.options.work / "trainer"),
        max_steps=length.steps,
        per_device_train_batch_size=length.batch_size,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=round(0.06 * length.steps),
        weight_decay=0.01,
        seed=seed,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    wall, cpu = time.perf_counter(), time.process_time()
    Trainer(
        model=attached.model,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=default_data_collator,
        callbacks=[*attached.callbacks, curve],
    ).train()
    return {
        "rate": rate,
        "seed": seed,
        "curve": curve.points,
        "loss": curve.points.get(length.steps),
        "trained": trained_parameters(attached.model),
        "structure": [{name: entry[name] for name in ("step", "action", "blocks")} for entry in attached.history],
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - wall, 1),
    }


def trained_parameters(model: Any) -> int:
    """Of a LoR2C adapter those in use under its structure."""
    tuner = getattr(model, "base_model", None)
    if hasattr(tuner, "num_adapter_parameters"):
        return tuner.num_adapter_parameters()
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Study:
    """The base, the texts, and the runs."""

    def __init__(self, options, base: Base, length: Length) -> None:
        from transformers import AutoTokenizer

        self.folder = pretrained(base, str(options.texts), options.work / "base")
        self.texts = Texts(options, AutoTokenizer.from_pretrained(self.folder), length)
        self.runs = Runs(options.work / "runs")

    def run(self, method: str, text: str, rate: float, seed: int) -> dict[str, Any]:
        make = partial(train, method, text, rate, seed, self.folder, self.texts)
        return self.runs(f"{method}_{text}_{rate:g}_{seed}", make)

    def tune(self, method: str) -> dict[str, Any]:
        centre = CENTRES.get(method, ADAPTER_CENTRE)
        return tune(lambda rate: self.run(method, TUNING_TEXT, rate, TUNING_SEED), centre)

    def on(self, text: str, method: str, rate: float) -> dict[str, Any]:
        """A method on a text: all seeds."""
        runs = [self.run(method, text, rate, seed) for seed in SEEDS]
        values = [run["loss"] for run in runs]
        return {
            "method": method,
            "text": text,
            "adapter": METHODS[method],
            "rate": rate,
            "trained": runs[0]["trained"],
            "bits_per_byte": values,
            "mean": None if None in values else statistics.mean(values),
            "stdev": None if None in values else statistics.stdev(values),
            "curves": [run["curve"] for run in runs],
            "structure": [run["structure"] for run in runs],
            "cpu_seconds": round(sum(run["cpu_seconds"] for run in runs), 1),
        }


def measure(options, results: ResultFile, base: Base, length: Length) -> None:
    """Everything that is not in the file: rates, then text by text."""
    study = Study(options, base, length)
    results.section("base", lambda: {**describe(base, study.folder), "length": asdict(length)})
    rates = {}
    for method in options.methods:
        rates[method] = results.section(f"rates of {method}", lambda method=method: study.tune(method))["rate"]
    for text in TEXTS:
        for method in options.methods:
            results.section(
                f"{method} on {text}",
                lambda text=text, method=method: study.on(text, method, rates[method]),
            )


def sections_of(results: ResultFile, method: str) -> dict[str, dict[str, Any]]:
    """text -> what there is of a method."""
    return {text: results[f"{method} on {text}"] for text in TEXTS if f"{method} on {text}" in results}


def at(section: dict[str, Any], step: int) -> float:
    """Mean over the seeds at a step."""
    return statistics.mean(curve[str(step)] for curve in section["curves"])


def print_tables(results: ResultFile) -> None:
    """Bits per byte at the end, then how far each method had come at the first two points of its curve."""
    header = "| method | trained | rate | " + " | ".join(TEXTS) + " |"
    print(f"{header}\n|---|---|---|{'---|' * len(TEXTS)}")
    methods = [method for method in METHODS if sections_of(results, method)]
    for method in methods:
        own = sections_of(results, method)
        first = next(iter(own.values()))
        cells = [f"{own[text]['mean']:.3f} ± {own[text]['stdev']:.3f}" if text in own else "-" for text in TEXTS]
        print(f"| {method} | {first['trained']:,} | {first['rate']:g} | {' | '.join(cells)} |")
    every = results["base"]["length"]["every"]
    steps = (0, every, 2 * every)
    print("\n| method | " + " | ".join(f"{text}, step {step}" for text in TEXTS for step in steps) + " |")
    print("|---|" + "---|" * len(TEXTS) * len(steps))
    for method in methods:
        own = sections_of(results, method)
        cells = [f"{at(own[text], step):.3f}" if text in own else "-" for text in TEXTS for step in steps]
        print(f"| {method} | {' | '.join(cells)} |")


def draw(results: ResultFile, path: Path) -> None:
    """Bits per byte against steps, a panel a text, mean over the seeds with their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 4.4), dpi=130, layout="constrained")
    for axes, text in zip(figure.subplots(1, len(TEXTS)), TEXTS, strict=True):
        for number, method in enumerate(METHODS):
            section = sections_of(results, method).get(text)
            if section is None:
                continue
            steps = [int(step) for step in section["curves"][0]][1:]
            values = [[curve[str(step)] for curve in section["curves"]] for step in steps]
            dashes = "-" if method.endswith("lor2c") else "--"
            label = f"{method.replace('_', ' ')} ({section['trained'] / 1000:,.0f}k)"
            colour = f"C{number}" if number < 10 else "black"
            means = [statistics.mean(value) for value in values]
            axes.plot(steps, means, dashes, marker=".", color=colour, lw=1.3, label=label)
            axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.1, lw=0)
        axes.set_title(text, fontsize="medium")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("bits per byte of held-out text")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="what the base reads: JSON lines with `text`")
    parser.add_argument("--gsm8k", type=Path, help="JSON lines with `question` and `answer`")
    parser.add_argument("--instructions", type=Path, help="JSON lines with `instruction`, `input` and `output`")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--work", type=Path, default=Path("runs/lor2c_causal"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lor2c_causal.json")
    parser.add_argument("--table", action="store_true", help="only show what there is")
    parser.add_argument("--png", action="store_true", help="draw the curves beside the results")
    parser.add_argument("--smoke", action="store_true", help="a few steps each")
    options = parser.parse_args()
    if not options.table and None in (options.texts, options.gsm8k, options.instructions):
        parser.error("give --texts, --gsm8k and --instructions, or --table")

    from crosslayer.cli.common import quiet_libraries

    quiet_libraries()
    command = "python benchmarks/lor2c_causal.py --texts FILE --gsm8k FILE --instructions FILE"
    results = ResultFile(
        options.out, "adapters on a small causal model: bits per byte of held-out text", command=command
    )
    if not options.table:
        base, length = (SMOKE_BASE, SMOKE_LENGTH) if options.smoke else (BASE, LENGTH)
        measure(options, results, base, length)
    print_tables(results)
    if options.png:
        draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
