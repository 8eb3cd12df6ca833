"""How far the learning rates of CR-Net may be raised until a run of ten fails, and what moves that limit.

    python benchmarks/stability.py --train train.jsonl.gz --validation valid.jsonl.gz
    python benchmarks/stability.py --write    puts the table of its result into docs/ablations.md

The shape and the text are those of ablations.py; runs are short, 150 steps of 8 x 128 tokens after 15 of warm-up, with
a cosine down to a tenth. All rates are multiplied alike, by powers of two, from those that ablations.py found (its
result, or --rates). A run trains if it ends finite and below the loss of a unigram model, which knows how often each
token occurs and reads nothing: who ends above it would have done better to ignore its input. The limit of a variant is
the largest multiple at which all of ten seeds train, found by bisection, so that failing is taken to be monotonic; a
multiple is given up at the first seed that fails. What a variant costs is its loss over three seeds at every multiple,
and the time of its steps, in turns with the others. Every run is a file in the work folder and every part a section of
the result, so that the script goes on where it stopped. About 1.2 hours of one core.
"""

import os
import statistics
import tempfile
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import TrainerCallback

from ablations import BLOCKS, as_recipe, base_content, begin, content_for, rates_of, study_parser
from crosslayer.crnet import CrossLayerLinear
from page_tables import filled, table
from result_file import ResultFile

STEPS, WARMUP, BLOCK_SIZE = 150, 15, 128
MULTIPLES, BELOW = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), 0.5  # losses are measured at half the rates too
SEEDS, LOSS_SEEDS, TIMED_STEPS, TURNS = tuple(range(10)), (0, 1, 2), 30, 3
SHOWN, NEAR, NEAR_AT = (1.0, 2.0, 4.0, 8.0), 0.25, 2.0
ITERATIONS, FIRST_ITERATIONS = 2, 20  # of the power method: in a step, and where a vector is new
PAGE = Path(__file__).parents[1] / "docs" / "ablations.md"
RESULTS = Path(__file__).parent / "results" / "stability.json"
COMMAND = "python benchmarks/stability.py --train FILE --validation FILE"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to train: changes to the model's configuration, beta's rate over that of A and B, and what is done to the
    Trainer before its first step."""

    model: dict[str, Any] = field(default_factory=dict)
    beta_factor: float = 1.0
    change: Callable[[Any], None] | None = None


class NormalizedIncrement(CrossLayerLinear):
    """Y_l = b Y_{l-1} + (X A / rms(X A)) B: X A of a token is divided by its root mean square over the rank."""

    def activate(self, low_rank: torch.Tensor) -> torch.Tensor:
        """X A / rms(X A): [..., r]."""
        return torch.nn.functional.rms_norm(low_rank, low_rank.shape[-1:], eps=1e-6)


def normalize_increments(trainer: Any) -> None:
    """Makes the cross-layer linears of the trainer's model `NormalizedIncrement`; nothing is drawn anew."""
    for linear in cross_layer_linears(trainer.model):
        linear.__class__ = NormalizedIncrement


def cross_layer_linears(model: torch.nn.Module) -> list[CrossLayerLinear]:
    return [module for module in model.modules() if isinstance(module, CrossLayerLinear)]


class BoundedProducts(TrainerCallback):
    """After every step: ||A B|| of a linear above `bound` in spectral norm makes A and B smaller, each by the square
    root of what is too much.

    All linears at once, by the power method on (B^T B)(A A^T) [r, r], whose largest eigenvalue is ||A B||^2, with the
    last step's vector; their ranks have to be equal.
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.vector: torch.Tensor | None = None

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        linears = cross_layer_linears(model)
        norms = self.norms(linears)
        for linear, norm in zip(linears, norms.tolist(), strict=True):
            if norm > self.bound:
                for factor in (linear.A, linear.B):
                    factor.weight.mul_((self.bound / norm) ** 0.5)

    def norms(self, linears: list[CrossLayerLinear]) -> torch.Tensor:
        """||A B|| of each, from below: [linears]."""
        grams = torch.stack([linear.B.weight.T @ linear.B.weight for linear in linears])
        grams = grams @ torch.stack([linear.A.weight @ linear.A.weight.T for linear in linears])
        iterations = ITERATIONS
        if self.vector is None:
            generator = torch.Generator().manual_seed(0)
            self.vector, iterations = torch.randn(*grams.shape[:2], 1, generator=generator), FIRST_ITERATIONS
        for _ in range(iterations):
            found = grams @ self.vector
            length = found.norm(dim=1, keepdim=True)
            self.vector = torch.where(length > 0, found / length, self.vector)
        return (grams @ self.vector).norm(dim=(1, 2)).sqrt()


def bound_products(bound: float) -> Callable[[Any], None]:
    return lambda trainer: trainer.add_callback(BoundedProducts(bound))


BOUNDS = (1.0, 2.0)  # after a plain run at the rates found the median of ||A B|| is 0.8 and the largest 1.7
VARIANTS = {
    "plain": Variant(),
    "beta's rate x 0.1": Variant(beta_factor=0.1),
    "beta's rate x 10": Variant(beta_factor=10.0),
    **{f"norm of A B at most {bound:g}": Variant(change=bound_products(bound)) for bound in BOUNDS},
    "normalised increment": Variant(change=normalize_increments),
    "silu between A and B": Variant(model={"increment_activation": "silu"}),
}


class Study:
    """What all sections share: the recipe, the rates, the work folder."""

    def __init__(self, options, rates: dict[str, float]) -> None:
        self.options, self.rates = options, rates
        self.steps = 4 if options.smoke else STEPS
        self.seeds = SEEDS[:2] if options.smoke else SEEDS
        self.loss_seeds = LOSS_SEEDS[:2] if options.smoke else LOSS_SEEDS
        self.multiples = (1.0, 1e8) if options.smoke else MULTIPLES
        base = base_content(options)
        base["data"] |= {} if options.smoke else {"block_size": BLOCK_SIZE}
        base["training"] |= {"max_steps": self.steps, "warmup_steps": min(WARMUP, self.steps // 2)}
        self.base = base

    def job(self, variant: Variant, multiple: float, seed: int, steps: int | None = None):
        from crosslayer.compare import Job

        content = content_for(variant.model, self.base, None)
        factors = content["parameter_groups"]
        factors["beta_lr_factor"] = variant.beta_factor * factors["low_rank_lr_factor"]
        return Job(
            method="crnet",
            recipe=content,
            rates={kind: rate * multiple for kind, rate in self.rates.items()},
            seed=seed,
            steps=steps or self.steps,
            validation_blocks=BLOCKS,
            whole_validation=False,
        )

    def run(self, name: str, multiple: float, seed: int) -> float | None:
        """The loss at the end; None: it diverged."""
        from crosslayer.compare.runs import run_once

        folder = self.options.work / "runs" / name.replace(" ", "_").replace("'", "")
        folder.mkdir(parents=True, exist_ok=True)
        variant = VARIANTS[name]
        return run_once(self.job(variant, multiple, seed), folder, variant.change)["loss"]

    @cached_property
    def unigram_loss(self) -> float:
        """Nats per token of the validation blocks under the training text's frequencies, one added to each count."""
        import numpy as np

        from crosslayer.data import prepare_data

        prepared = prepare_data(as_recipe(self.base).data)
        vocabulary = len(prepared.tokenizer)
        counts = np.ones(vocabulary)
        for rows in prepared.train.with_format("numpy").iter(batch_size=1000):
            counts += np.bincount(rows["input_ids"].ravel(), minlength=vocabulary)
        first = prepared.validation.select(range(min(BLOCKS, len(prepared.validation))))
        labels = np.concatenate([row["labels"][1:] for row in first.with_format("numpy")])
        return float(-np.log(counts / counts.sum())[labels[labels >= 0]].mean())

    def trains(self, loss: float | None) -> bool:
        return loss is not None and loss < self.unigram_loss

    def measure_variant(self, name: str) -> dict[str, Any]:
        """The limit of a variant, and its losses at every multiple."""
        tested: dict[float, list[float | None]] = {}

        def fails(multiple: float) -> bool:
            tested[multiple] = losses = []
            for seed in self.seeds:
                losses.append(self.run(name, multiple, seed))
                if not self.trains(losses[-1]):
                    return True
            return False

        first_failing = bisect_left(self.multiples, True, key=fails)
        means = {}
        for multiple in (BELOW, *self.multiples[: first_failing + 1]):
            losses = [self.run(name, multiple, seed) for seed in self.loss_seeds]
            means[multiple] = None if None in losses else statistics.mean(losses)
        finite = {multiple: loss for multiple, loss in means.items() if loss is not None}
        best = min(finite, key=finite.__getitem__, default=None)
        return {
            "largest_multiple": self.multiples[first_failing - 1] if first_failing else None,
            "is_at_end_of_grid": first_failing == len(self.multiples),
            "tested": [{"multiple": multiple, "losses": tested[multiple]} for multiple in sorted(tested)],
            "losses": [{"multiple": multiple, "loss_mean": loss} for multiple, loss in means.items()],
            "best": None if best is None else self.at(name, best),
        }

    def at(self, name: str, multiple: float) -> dict[str, Any]:
        """The losses of a variant at one multiple, read from its runs."""
        losses = [self.run(name, multiple, seed) for seed in self.loss_seeds]
        return {"multiple": multiple, "losses": losses, "loss_mean": statistics.mean(losses)}

    def measure_norms(self) -> dict[str, Any]:
        """||A B|| of the cross-layer linears after a plain run at the rates found, to choose bounds by."""
        from crosslayer.compare.runs import run_once

        found: list[Any] = []
        with tempfile.TemporaryDirectory() as folder:
            run_once(self.job(VARIANTS["plain"], 1.0, self.seeds[0]), Path(folder), found.append)
        products = [linear.B.weight @ linear.A.weight for linear in cross_layer_linears(found[0].model)]
        norms = sorted(torch.linalg.matrix_norm(product.detach(), 2).item() for product in products)
        return {"smallest": norms[0], "median": statistics.median(norms), "largest": norms[-1]}

    def measure_time(self) -> dict[str, Any]:
        """CPU seconds of the same steps, the variants in turns; ratios to plain within a turn."""
        from crosslayer.compare.runs import run_once

        steps, turns = (2, 2) if self.options.smoke else (TIMED_STEPS, TURNS)
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for turn in range(turns):
            for name, variant in VARIANTS.items():
                with tempfile.TemporaryDirectory() as folder:
                    job = self.job(variant, 1.0, turn, steps)
                    seconds[name].append(run_once(job, Path(folder), variant.change)["seconds"])
        return {
            "steps": steps,
            "milliseconds_per_step": {
                name: round(1e3 * statistics.median(times) / steps, 2) for name, times in seconds.items()
            },
            "over_plain": {
                name: round(statistics.median(a / b for a, b in zip(times, seconds["plain"], strict=True)), 3)
                for name, times in seconds.items()
            },
        }

    def about(self) -> dict[str, Any]:
        training = self.base["training"]
        return {
            "model": self.base["model"],
            "rates": self.rates,
            "steps": self.steps,
            "tokens": self.steps * training["per_device_train_batch_size"] * self.base["data"]["block_size"],
            "multiples": list(self.multiples),
            "seeds": list(self.seeds),
            "loss_seeds": list(self.loss_seeds),
            "unigram_loss": self.unigram_loss,
            "norms_of_products": self.measure_norms(),
            "texts": {"train": self.options.train.name, "validation": self.options.validation.name},
        }


def limits(path: Path = RESULTS) -> str:
    """The table of a result: what has been measured of it."""
    results = ResultFile(path, "")
    rows = []
    for name in VARIANTS:
        if name not in results:
            continue
        section = results[name]
        limit, more = section["largest_multiple"], " or more" if section["is_at_end_of_grid"] else ""
        means = {point["multiple"]: point["loss_mean"] for point in section["losses"]}
        best = section["best"]
        cells = ["–" if best is None else f"{best['loss_mean']:.3f} ({best['multiple']:g})"]
        cells += ["–" if means.get(multiple) is None else f"{means[multiple]:.3f}" for multiple in SHOWN]
        time = f"{results['time']['over_plain'][name]:.2f}" if "time" in results else "–"
        rows.append([name, "below 1" if limit is None else f"{limit:g}{more}", near(results, name), *cells, time])
    header = ["", "all ten train up to", "near at 2", "best loss (at)"]
    return table([*header, *(f"loss at {multiple:g}" for multiple in SHOWN), "time of a step"], rows)


def near(results: ResultFile, name: str) -> str:
    """How many seeds at `NEAR_AT` end less than `NEAR` above plain's mean at the rates found; where all were run."""
    (plain,) = (point["loss_mean"] for point in results["plain"]["losses"] if point["multiple"] == 1)
    losses = next((test["losses"] for test in results[name]["tested"] if test["multiple"] == NEAR_AT), [])
    if len(losses) < len(results["settings"]["seeds"]):
        return "–"
    return f"{sum(loss is not None and loss < plain + NEAR for loss in losses)} of {len(losses)}"


TABLES = {"stability": limits}


def draw(results: ResultFile, path: Path) -> None:
    """Final loss against the multiple of all rates, and the limit of each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.4), dpi=130, layout="constrained")
    loss, limit = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [name for name in VARIANTS if name in results]
    for at, name in enumerate(names):
        section = results[name]
        points = [point for point in section["losses"] if point["loss_mean"] is not None]
        (line,) = loss.plot([p["multiple"] for p in points], [p["loss_mean"] for p in points], "o-", ms=3, label=name)
        if section["largest_multiple"] is not None:
            limit.plot(section["largest_multiple"], at, "o", color=line.get_color())
    unigram = results["settings"]["unigram_loss"]
    loss.axhline(unigram, color="0.4", ls=":", label="unigram model")
    loss.set_ylim(top=unigram + 0.2)
    loss.set_ylabel("validation loss, mean of three seeds")
    limit.set_yticks(range(len(names)), names)
    limit.invert_yaxis()
    limit.set_title("all of ten seeds train up to", fontsize="medium")
    for axes in (loss, limit):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("multiple of all learning rates")
        axes.grid(alpha=0.3)
    limit.set_xlim(loss.get_xlim())
    loss.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = study_parser(__doc__, "stability", RESULTS)
    parser.add_argument("--only", choices=VARIANTS, nargs="+", default=list(VARIANTS), help="some of the variants")
    options = parser.parse_args()
    if options.write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), TABLES, PAGE.name), encoding="utf-8")
        return
    begin(parser, options)
    what = "the largest multiple of its learning rates at which ten runs of CR-Net of ten train, and the loss there"
    results = ResultFile(options.out, what, command=COMMAND)
    study = Study(options, rates_of(options.rates, results))
    results.section("settings", study.about)
    for name in options.only:
        results.section(name, partial(study.measure_variant, name))
    if set(options.only) == set(VARIANTS):
        results.section("time", study.measure_time)
    draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
