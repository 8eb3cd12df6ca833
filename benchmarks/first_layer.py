"""Can a low-rank first layer of CR-Net be as good as a full-rank one, at as many parameters in all?

    python benchmarks/first_layer.py --train train.jsonl.gz --validation valid.jsonl.gz
    python benchmarks/first_layer.py --write    puts the tables of its result into docs/ablations.md

The shape, the text and the lengths of runs are those of ablations.py; all contenders but the second have, to a
hundredth, the parameters of CR-Net, whose first layer is full rank. Every contender is screened with one seed by runs
of a fifth of the length, at the rates that ablations.py found for CR-Net (its result, or --rates) and at half and twice
the rate of A and B. The three best low-rank first layers, the plain one and CR-Net then train for the whole length with
three seeds, each at its best rate. Every run is a file in the work folder and every part a section of the result, so
that the script goes on where it stopped. About 2.5 hours of one core.
"""

import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from transformers import TrainerCallback

from ablations import (
    BLOCKS,
    SEEDS,
    SHAPE,
    TUNING_SEED,
    TUNING_SHARE,
    as_recipe,
    base_content,
    begin,
    content_for,
    equal_rank,
    rates_of,
    study_parser,
)
from crosslayer.crnet import LowRankLinear
from page_tables import filled, table
from result_file import ResultFile

PAGE = Path(__file__).parents[1] / "docs" / "ablations.md"
RESULTS = Path(__file__).parent / "results" / "first_layer.json"
COMMAND = "python benchmarks/first_layer.py --train FILE --validation FILE"
FACTORS = (1.0, 0.5, 2.0)
EQUAL = {"first_layer_rank": None, "rank": None}  # the rank that `equal_rank` of ablations.py gives
COLA = {"low_rank_initializer_range": "cola"}  # how A and B start
FINALISTS = 3


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A first layer.

    Args:
        model: changes to CR-Net's configuration.
        alter: makes another first layer of the built model's one, linear by linear.
        full_rank_share: of the steps, in which the first layer is full rank; then its linears become low rank.
        rate_factor: on the learning rate of the first layer's A and B.
    """

    model: dict[str, Any]
    alter: Callable[[LowRankLinear], LowRankLinear] | None = None
    full_rank_share: float = 0.0
    rate_factor: float = 1.0


class PlusDiagonal(LowRankLinear):
    """Y = X D + (X A) B with D [in, out] diagonal: as many numbers as the smaller width, 0 at first, at the
    rate of norms."""

    def __init__(self, like: LowRankLinear) -> None:
        super().__init__(like.in_features, like.out_features, like.A.out_features)
        self.load_state_dict(like.state_dict())
        self.diagonal = nn.Parameter(torch.zeros(min(like.in_features, like.out_features)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        width = len(self.diagonal)
        carried = self.diagonal * x[..., :width]
        return self.increment(x) + nn.functional.pad(carried, (0, self.out_features - width))


class CarriesInput(LowRankLinear):
    """Y = b X + (X A) B, as if the linear's own input were the output below: its first columns where it is wider than
    Y, repeated to Y's width where it is narrower. b, A and B start as in the layers above: 1, N(0, 1 / in), 0."""

    def __init__(self, like: LowRankLinear) -> None:
        super().__init__(like.in_features, like.out_features, like.A.out_features)
        nn.init.normal_(self.A.weight, std=self.in_features**-0.5)
        nn.init.zeros_(self.B.weight)
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        times = math.ceil(self.out_features / self.in_features)
        return self.beta * torch.cat([x] * times, dim=-1)[..., : self.out_features] + self.increment(x)


@torch.no_grad()
def orthogonal(linear: LowRankLinear) -> LowRankLinear:
    """A has orthogonal rows and B orthogonal columns, all of one length; ||A B||_F is what it is on average for the
    factors that were there."""
    rank, sides = linear.A.out_features, (linear.in_features, linear.out_features)
    norm = math.sqrt(math.prod(sides) / sum(sides))
    for factor in (linear.A, linear.B):
        nn.init.orthogonal_(factor.weight, gain=math.sqrt(norm / math.sqrt(rank)))
    return linear


def spectral(linear: LowRankLinear) -> LowRankLinear:
    """The best A B of a dense matrix as the full-rank first layer starts with: spectral initialisation, arXiv
    2105.01029."""
    dense = torch.empty(linear.out_features, linear.in_features)
    return factorized(nn.init.normal_(dense, std=0.02), linear.A.out_features)


@torch.no_grad()
def factorized(weight: torch.Tensor, rank: int) -> LowRankLinear:
    """The best low-rank linear in the place of a dense weight [out, in]; A and B share the singular values evenly."""
    linear = LowRankLinear(weight.shape[1], weight.shape[0], rank)
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    roots = S[:rank].sqrt()
    linear.A.weight.copy_(roots[:, None] * V[:rank])
    linear.B.weight.copy_(U[:, :rank] * roots)
    return linear


def first_linears(model: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """(parent, attribute, linear) of the positions of the first layer."""
    block = model.base_model.layers[0]
    places = [place.module.rpartition(".") for place in block.places.values()]
    found = [(block.find(parent), name, getattr(block.find(parent), name)) for parent, _, name in places]
    assert all(isinstance(linear, kind) for *_, linear in found)
    return found


class FactorizeFirstLayer(TrainerCallback):
    """After `step` steps the first layer's dense linears become low rank; their factors join the optimizer's group of
    A and B, without moments."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if state.global_step != self.step:
            return
        groups = {group["name"]: group["params"] for group in optimizer.param_groups}
        for parent, name, dense in first_linears(model, nn.Linear):
            linear = factorized(dense.weight, self.rank)
            setattr(parent, name, linear)
            groups["full_rank"][:] = [parameter for parameter in groups["full_rank"] if parameter is not dense.weight]
            groups["low_rank"] += linear.parameters()
            optimizer.state.pop(dense.weight, None)


CONTENDERS = {
    "full rank (CR-Net)": Contender(model={}),
    "low rank, the others' rank": Contender(model={**COLA, "first_layer_rank": SHAPE["rank"]}),
    "low rank": Contender(model={**EQUAL, **COLA}),
    "low rank, 30 and 18 above": Contender(model={**COLA, "first_layer_rank": 30, "rank": 18}),
    "orthogonal start": Contender(model={**EQUAL, **COLA}, alter=orthogonal),
    "the norm of a dense start": Contender(model={**EQUAL, "low_rank_initializer_range": 0.02}),
    "spectral start": Contender(model={**EQUAL, **COLA}, alter=spectral),
    "plus a diagonal": Contender(model={**EQUAL, **COLA}, alter=PlusDiagonal),
    "carries its input": Contender(model={**EQUAL, **COLA}, alter=CarriesInput),
    "a quarter of the rate": Contender(model={**EQUAL, **COLA}, rate_factor=0.25),
    "full rank for 10 % of the steps": Contender(model=EQUAL, full_rank_share=0.1),
    "full rank for 20 % of the steps": Contender(model=EQUAL, full_rank_share=0.2),
}
REFERENCES = ("full rank (CR-Net)", "low rank")
NOT_EQUAL = "low rank, the others' rank"


class Study:
    """What all sections share: the recipe, the rates, the work folder."""

    def __init__(self, options, rates: dict[str, float]) -> None:
        self.options, self.rates = options, rates
        self.base = base_content(options)
        self.rank = equal_rank(self.base)
        self.steps = self.base["training"]["max_steps"]
        self.seeds = SEEDS[:2] if options.smoke else SEEDS

    def run(self, name: str, factor: float, seed: int, whole: bool) -> dict[str, Any]:
        """One run, screening or whole; a loss of None: it diverged."""
        from crosslayer.compare import Job
        from crosslayer.compare.runs import run_once

        contender, folder = CONTENDERS[name], self.options.work / "runs" / "".join(filter(str.isalnum, name))
        folder.mkdir(parents=True, exist_ok=True)
        content = self.content(name)
        if contender.full_rank_share:
            del content["model"]["first_layer_rank"]
        job = Job(
            method="crnet",
            recipe=content,
            rates={**self.rates, "low_rank": self.rates["low_rank"] * factor},
            seed=seed,
            steps=self.steps if whole else max(1, self.steps // TUNING_SHARE),
            validation_blocks=BLOCKS,
            whole_validation=whole,
        )
        return run_once(job, folder, partial(prepare, contender=contender, rank=self.rank, steps=job.steps))

    def content(self, name: str) -> dict[str, Any]:
        """The recipe of a contender."""
        return content_for(
            {field: rank or self.rank for field, rank in CONTENDERS[name].model.items()}, self.base, None
        )

    def screen(self, name: str) -> dict[str, Any]:
        """A contender's losses after a fifth of the steps."""
        tried = {factor: self.run(name, factor, TUNING_SEED, False)["loss"] for factor in FACTORS}
        finite = {factor: loss for factor, loss in tried.items() if loss is not None}
        best = min(finite, key=finite.__getitem__, default=None)
        rates = [self.rates["low_rank"] * factor for factor in tried]
        return {
            "parameters_without_embeddings": self.parameters(name),
            "tried": [{"low_rank": rate, "loss": loss} for rate, loss in zip(rates, tried.values(), strict=True)],
            "best_factor": best,
            "loss": finite.get(best),
        }

    def train(self, name: str, factor: float) -> dict[str, Any]:
        """A contender's losses after all steps."""
        runs = [self.run(name, factor, seed, True) for seed in self.seeds]
        losses = [run["loss"] for run in runs]
        return {
            "parameters_without_embeddings": self.parameters(name),
            "rates": {**self.rates, "low_rank": self.rates["low_rank"] * factor},
            "losses": losses,
            "loss_mean": None if None in losses else statistics.mean(losses),
            "loss_stdev": None if None in losses else statistics.stdev(losses),
            "perplexities": [run["perplexity"] for run in runs],
        }

    def parameters(self, name: str) -> int:
        """Of a contender's model as it ends, embeddings and head aside."""
        from crosslayer.train.run import build_model, build_model_config

        contender = CONTENDERS[name]
        model = build_model(build_model_config(as_recipe(self.content(name))), 0)
        alter(model, contender)
        outside = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        return sum(p.numel() for p in model.parameters() if all(p is not other for other in outside))

    def about(self) -> dict[str, Any]:
        training, data = self.base["training"], self.base["data"]
        tokens_per_step = training["per_device_train_batch_size"] * data["block_size"]
        return {
            "model": self.base["model"],
            "rates": self.rates,
            "steps": self.steps,
            "screening_steps": max(1, self.steps // TUNING_SHARE),
            "screening_seed": TUNING_SEED,
            "tokens": self.steps * tokens_per_step,
            "seeds": list(self.seeds),
            "texts": {"train": self.options.train.name, "validation": self.options.validation.name},
        }


def alter(model: nn.Module, contender: Contender) -> None:
    """Gives a built model the contender's first layer."""
    if contender.alter is None:
        return
    for parent, name, linear in first_linears(model, LowRankLinear):
        setattr(parent, name, contender.alter(linear))


def prepare(trainer: Any, contender: Contender, rank: int, steps: int) -> None:
    """Makes a Trainer a contender's."""
    alter(trainer.model, contender)
    if contender.full_rank_share:
        trainer.add_callback(FactorizeFirstLayer(max(1, round(contender.full_rank_share * steps)), rank))
    if contender.rate_factor != 1:
        slow_down(trainer, contender.rate_factor)


def slow_down(trainer: Any, factor: float) -> None:
    """Another learning rate for A and B of the first layer."""
    optimizer = trainer.create_optimizer()
    (group,) = (group for group in optimizer.param_groups if group["name"] == "low_rank")
    first = {id(p) for *_, linear in first_linears(trainer.model, LowRankLinear) for p in linear.parameters()}
    slow = [parameter for parameter in group["params"] if id(parameter) in first]
    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in first]
    optimizer.add_param_group({**group, "params": slow, "lr": group["lr"] * factor, "name": "first_layer"})


def finalists(results: ResultFile) -> list[str]:
    """The references, and the best of the others that have CR-Net's parameters."""
    losses = {name: results[f"screening: {name}"]["loss"] for name in CONTENDERS}
    others = [n for n, loss in losses.items() if n not in (*REFERENCES, NOT_EQUAL) and loss is not None]
    return [*REFERENCES, *sorted(others, key=losses.__getitem__)[:FINALISTS]]


def screened(path: Path = RESULTS) -> str:
    """The table of a fifth of the steps: what has been measured of it."""
    results = ResultFile(path, "")
    sections = {name: results[f"screening: {name}"] for name in CONTENDERS if f"screening: {name}" in results}
    if not sections:
        return table(("first layer", "parameters"), [])
    reference = sections[REFERENCES[0]]["loss"]
    rates = sorted(tried["low_rank"] for tried in sections[REFERENCES[0]]["tried"])
    rows = []
    for name, section in sections.items():
        losses = {tried["low_rank"]: tried["loss"] for tried in section["tried"]}
        cells = ["diverged" if losses[rate] is None else f"{losses[rate]:.4f}" for rate in rates]
        behind = "–" if section["loss"] is None else f"{section['loss'] - reference:+.4f}"
        rows.append([name, f"{section['parameters_without_embeddings']:,}", *cells, behind])
    header = ("first layer", "parameters", *(f"loss at {rate:g}" for rate in rates), "best, to full rank")
    return table(header, rows)


def trained(path: Path = RESULTS) -> str:
    """The table of all steps: what has been measured of it."""
    results = ResultFile(path, "")
    rows = []
    for name in (name for name in CONTENDERS if name in results):
        section = results[name]
        ours, reference = (section["losses"], results[REFERENCES[0]]["losses"])
        if None in ours:
            rows.append([name, f"{section['parameters_without_embeddings']:,}", "diverged", "", ""])
            continue
        loss = f"{section['loss_mean']:.4f} ± {section['loss_stdev']:.4f}"
        differences = ", ".join(f"{a - b:+.4f}" for a, b in zip(ours, reference, strict=True))
        perplexity = f"{math.exp(statistics.mean(ours) - statistics.mean(reference)) - 1:+.1%}"
        rows.append([name, f"{section['parameters_without_embeddings']:,}", loss, differences, perplexity])
    if not rows:
        return "Not measured yet."
    return table(("first layer", "parameters", "validation loss", "to full rank, by seed", "perplexity"), rows)


TABLES = {"first layer, screened": screened, "first layer, trained": trained}


def main() -> None:
    parser = study_parser(__doc__, "first_layer", RESULTS)
    options = parser.parse_args()
    if options.write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), TABLES, PAGE.name), encoding="utf-8")
        return
    begin(parser, options)
    what = "validation loss (nats per token) of CR-Nets with equal numbers of parameters, by their first layer"
    results = ResultFile(options.out, what, command=COMMAND)
    study = Study(options, rates_of(options.rates, results))
    results.section("settings", study.about)
    for factor in FACTORS:  # those runs first that compare all contenders
        for name in CONTENDERS:
            if f"screening: {name}" not in results:
                study.run(name, factor, TUNING_SEED, False)
    for name in CONTENDERS:
        results.section(f"screening: {name}", partial(study.screen, name))
    for name in finalists(results):
        factor = results[f"screening: {name}"]["best_factor"]
        results.section(name, partial(study.train, name, factor))


if __name__ == "__main__":
    main()
