"""What a run leaves behind for people: a table, a curve, a model card."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..accounting import count_parameters
from ..crnet import CRNetConfig
from ..crnet.families import family_of
from ..provenance import Provenance

DEFINITION = (
    "Perplexity is exp of the mean negative log-likelihood over every token of the validation split, documents kept "
    "apart, context at most one block; bits per byte is the same sum in bits over the UTF-8 bytes of the text."
)


@dataclass(kw_only=True, frozen=True)
class RunFacts:
    """What is known of a run before its first step."""

    recipe: dict[str, Any]
    run: Provenance
    plan: dict[str, Any]
    data: dict[str, Any]
    seed: int


@dataclass(kw_only=True, frozen=True)
class RunReport(RunFacts):
    """Everything a run measured. `model` and `tokenizer` are there for the caller, not for the file."""

    before: dict[str, Any] | None
    after: dict[str, Any]
    steps: int
    tokens: int
    tokens_per_s: float | None
    peak_memory_bytes: int
    seconds: float
    history: list[dict[str, Any]]
    skipped_steps: list[int] = field(default_factory=list)
    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all but model and tokenizer."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("model", "tokenizer")}

    def rows(self) -> list[tuple[str, str]]:
        """The final table, as (what, value)."""
        parameters = sum(self.plan["parameters"].values())
        dense = self.plan["dense_parameters"]
        body = _body(self.plan["parameters"])
        dense_body = dense - (parameters - body)
        rows = [
            ("parameters", f"{parameters / 1e6:.2f}M, dense model of the same shape {dense / 1e6:.2f}M"),
            (
                "  without embeddings and head",
                f"{body / 1e6:.2f}M of {dense_body / 1e6:.2f}M ({body / dense_body:.0%})",
            ),
        ]
        if self.before:
            for label, key, digits in (
                ("validation perplexity", "eval_perplexity", 2),
                ("validation bits per byte", "eval_bits_per_byte", 3),
            ):
                if self.before.get(key) is not None and self.after.get(key) is not None:
                    rows.append((label, f"{self.before[key]:,.{digits}f} before, {self.after[key]:,.{digits}f} after"))
        rows.append(("tokens seen", f"{self.tokens:,} in {self.steps} steps"))
        if self.skipped_steps:
            rows.append(("steps left out", f"{len(self.skipped_steps)}, not finite"))
        if self.tokens_per_s:
            rows.append(("tokens/s", f"{self.tokens_per_s:,.0f} on {self.plan['device']}"))
        rows.append(("peak memory", f"{self.peak_memory_bytes / 2**20:,.0f} MiB"))
        rows.append(("time", f"{self.seconds:,.0f} s"))
        return rows


def write_report(output_dir: Path, report: RunReport) -> None:
    """report.json, report.md and log.jsonl, and loss.png where matplotlib is installed."""
    (output_dir / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    (output_dir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in report.history), encoding="utf-8")
    table = "\n".join(f"| {what.strip()} | {value} |" for what, value in report.rows())
    (output_dir / "report.md").write_text(
        f"# {report.recipe['name']}\n\n{report.recipe['description']}\n\n| | |\n|---|---|\n{table}\n\n{DEFINITION}\n",
        encoding="utf-8",
        errors="backslashreplace",
    )
    draw_loss(output_dir / "loss.png", report)


def draw_loss(path: Path, report: RunReport) -> bool:
    """Training and validation loss against tokens, as a PNG. False, and no file, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    train = [(line["num_input_tokens_seen"], line["loss"]) for line in report.history if "loss" in line]
    validation = [(line["num_input_tokens_seen"], line["eval_loss"]) for line in report.history if "eval_loss" in line]
    if report.before:
        validation.insert(0, (0, report.before["eval_loss"]))
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([t / 1e6 for t, _ in train], [loss for _, loss in train], label="training", linewidth=1.2)
    axes.plot(
        [t / 1e6 for t, _ in validation], [loss for _, loss in validation], label="validation", marker="o", markersize=4
    )
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(report.recipe["name"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
    return True


def write_card(folder: Path, config: CRNetConfig, report: RunFacts) -> None:
    """The model card (README.md) of a checkpoint folder: with the results where `report` is a RunReport."""
    from huggingface_hub import ModelCard, ModelCardData

    counts = count_parameters(config)
    parameters, dense = sum(counts.values()), report.plan["dense_parameters"]
    quality = "Not evaluated yet: a checkpoint of a run under way."
    if isinstance(report, RunReport):
        result = report.after
        quality = f"Validation perplexity {result['perplexity']:.2f} over {result['tokens']:,} tokens"
        if result["bits_per_byte"] is not None:
            quality += f", {result['bits_per_byte']:.3f} bits per byte"
        quality += f", after {report.tokens:,} training tokens. {DEFINITION}"
    shape = f"{config.num_hidden_layers}, {config.hidden_size}, {_widths(config)}, {config.num_attention_heads}"
    plan = report.plan
    training = f"{plan['steps']} steps of {plan['tokens_per_step']:,} tokens, {plan['precision']}, seed {report.seed}"
    versions = ", ".join(f"{name} {version}" for name, version in report.run["versions"].items())
    command = report.run["command"] or "crosslayer.train.run.pretrain(recipe, output_dir)"
    card_data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["crnet", "low-rank"])
    text = f"""---
{card_data.to_yaml()}
---

# {report.recipe["name"]}

{report.recipe["description"]}

A language model of the family `{family_of(config)}` with `factorization="{config.factorization}"`, pre-trained with
crosslayer.
{_METHOD[config.factorization]}

| | |
|---|---|
| layers, width, MLP, heads | {shape} |
| rank per layer | {_ranks(config)} |
| parameters | {parameters:,} (dense model of the same shape: {dense:,}) |
| vocabulary | {config.vocab_size:,} |
| data | `{report.data["source"]}`, {report.data["train"]["tokens"] or "streamed"} training tokens |
| training | {training} |

{quality}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

The folder carries its modelling code, which `trust_remote_code=True` lets transformers run; with `import crosslayer`
first, the flag is not needed.

## Origin

Command: `{command}`; versions: crosslayer {report.run["crosslayer"]}, {versions}; device: {report.run["device"]}.
The data's licence is its own: check it before sharing the weights.
"""
    ModelCard(text, ignore_metadata_errors=True).save(folder / "README.md")


_METHOD = {
    "cross_layer": (
        "Every linear output is the previous layer's output times a learned scalar plus a low-rank increment; the "
        "first layer is full rank (CR-Net, arXiv 2509.18993)."
    ),
    "low_rank": "Every linear of a layer is a product of two low-rank matrices.",
    "cola": "Every linear of a layer is B silu(A x) of low rank (CoLA, arXiv 2502.10940).",
    "dense": "Every linear is dense, as in transformers' own model.",
}


def _widths(config: CRNetConfig) -> str:
    """Of the MLPs, each once: "344", or "344 and 8 experts of 96"."""
    widths: dict[str, None] = {}
    for layer_idx in range(config.num_hidden_layers):
        for name, place in config.positions(layer_idx).items():
            if place.mixture is not None:
                widths[f"{place.mixture.experts} experts of {place.mixture.width}"] = None
            elif name == "up":
                widths[str(place.out_features)] = None
    return " and ".join(widths)


def _ranks(config: CRNetConfig) -> str:
    def of_layer(layer_idx: int) -> str:
        ranks = {config.linear_rank(layer_idx, position) for position in config.positions(layer_idx)}
        names = sorted("full" if rank is None else str(rank) for rank in ranks)
        return "/".join(names)

    layers = [of_layer(layer_idx) for layer_idx in range(config.num_hidden_layers)]
    if len(set(layers[1:])) <= 1 and len(layers) > 1:
        return f"{layers[0]} in the first, {layers[1]} in the others" if layers[0] != layers[1] else layers[0]
    return ", ".join(layers)


def _body(counts: dict[str, int]) -> int:
    return sum(counts.values()) - counts["embeddings"] - counts["head"]
