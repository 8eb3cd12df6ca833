"""`crosslayer analyze`: cross-layer spectra of a model, ranks for CR-Net, the health of a run."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Data, Device, Split, TextColumn, spelled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..analysis import Spectra
    from ..analysis.ranks import SuggestedRanks
    from ..data import DataConfig

SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def analyze(
    model: Annotated[str | None, typer.Argument(help="Folder of a model or of a run, or a name on the hub.")] = None,
    before: Annotated[str | None, typer.Option(help="Compare two: the model before fine-tuning ...")] = None,
    after: Annotated[str | None, typer.Option(help="... and after it. Both read BEFORE's tokens.")] = None,
    health: Annotated[
        bool, typer.Option("--health", help="Draw the training health of MODEL, the folder of a CR-Net run.")
    ] = False,
    data: Data = "python-library",
    text_column: TextColumn = "text",
    split: Split = "train",
    max_tokens: Annotated[
        int, spelled("max_tokens", "Tokens to read; at least four times the widest output.")
    ] = 32_768,
    block_size: Annotated[
        int | None,
        spelled("block_size", "Longest piece in tokens [default: the model's, <= 512]."),
    ] = None,
    batch_size: Annotated[int, spelled("batch_size", "Pieces at a time.")] = 8,
    ranks: Annotated[
        str | None, typer.Option(help="Ranks to report, such as 16,64,256 [default: powers of two and width / 4].")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Positions to look at, such as q,k,down [default: all].")
    ] = None,
    suggest_ranks: Annotated[bool, spelled("suggest-ranks", "Turn the spectra into a rank_pattern.")] = False,
    rank_budget: Annotated[
        str | None,
        spelled(
            "rank_budget",
            "Parameters of all A and B, such as 250k [default: the CR-Net's own, else those of rank width / 4].",
        ),
    ] = None,
    rank_multiple: Annotated[int | None, spelled("rank_multiple", "Step of the ranks [default: 8 at most].")] = None,
    gram_memory: Annotated[
        str | None,
        spelled(
            "gram_memory",
            "Bytes of Gram matrices at a time, such as 4G; less means more passes over the text [default: a "
            "quarter of the weights, at least 256 MiB].",
        ),
    ] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="Draw the weights anew: what chance gives.")] = False,
    seed: Annotated[int, typer.Option(help="Of those weights.")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub name [default: the model's].")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16, float64.")] = "auto",
    device: Device = None,
    output_dir: Annotated[
        str | None,
        spelled("output_dir", "Folder of the results [default: runs/analysis/NAME]."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """How close to low rank the outputs of neighbouring layers are, in MODEL, on a text.

    For every layer and position: the error of the best rank-r approximation of Y_l, of Y_l - b0 Y_{l-1} and of
    Y_l - Y_{l-1}, cosines, stable, effective and energy ranks. Writes spectra.json, summary.md, curves.png and
    maps.png; ranks.png with --suggest-ranks, comparison.png with --before and --after, health.png with --health.
    """
    from .common import print_json, quiet_libraries

    check_subject(model, before, after, health=health, suggest=suggest_ranks, ranked=bool(rank_budget or rank_multiple))
    budget, gram_bytes = parse_size(rank_budget, "rank_budget"), parse_size(gram_memory, "gram_memory")
    measuring = {"ranks": parse_ranks(ranks), "only": positions.split(",") if positions else None}
    names = [name for name in (model, before, after) if name]
    folder = Path(output_dir or f"runs/analysis/{'-'.join(map(short_name, names))}")
    if health:
        show_health(names[0], folder, as_json)
        return

    quiet_libraries()
    from ..data import DataConfig
    from .evaluate import choose_device

    place = choose_device(device)
    source = DataConfig(data=data, text_column=text_column, split=split, streaming=data.startswith("hf:"))
    text = Text(source, tokenizer, max_tokens, block_size, batch_size)
    weights = {"untrained": untrained, "seed": seed, "dtype": dtype}
    spectra = list(
        measured(names, text, weights, place, hidden=as_json, settings={**measuring, "gram_bytes": gram_bytes})
    )

    # Imported late: it weighs as much as a small model, which is gone by now.
    from ..analysis.ranks import suggest_ranks as suggest

    what = {"text": data if source.data == "python-library" else Path(data).name, "device": place, "dtype": dtype}
    if untrained:
        what["weights"] = f"untrained, seed {seed}"
    suggested = suggest(spectra[0], budget, rank_multiple) if suggest_ranks else None
    content, words = write_spectra(folder, names, spectra, what, suggested)
    if as_json:
        print_json(content)
    else:
        print(words)
        show_paths(folder)


def check_subject(
    model: str | None, before: str | None, after: str | None, *, health: bool, suggest: bool, ranked: bool
) -> None:
    """Raises ConfigError for options that do not belong together."""
    from ..errors import ConfigError

    given = [name for name, value in (("MODEL", model), ("--before", before), ("--after", after)) if value]
    for is_wrong, message in (
        (given not in (["MODEL"], ["--before", "--after"]), "give MODEL, or both --before and --after"),
        (health and not model, "--health wants MODEL, the folder of a CR-Net run"),
        (suggest and not model, "--suggest-ranks is for one MODEL, not for a comparison"),
        (suggest and health, "--suggest-ranks and --health exclude each other"),
        (ranked and not suggest, "rank_budget and rank_multiple need --suggest-ranks"),
    ):
        if is_wrong:
            raise ConfigError(message)


@dataclass
class Text:
    """What the models read."""

    source: "DataConfig"
    tokenizer: str | None
    max_tokens: int
    block_size: int | None
    batch_size: int

    def batches(self, model_name: str, model: Any) -> list[dict[str, Any]]:
        """Batches for a model. Raises ConfigError where the tokens are not the model's."""
        from ..data.fit import block_length
        from ..loading import load_text_tokenizer

        tokenizer = load_text_tokenizer(self.tokenizer or model_name)
        size = block_length(self.block_size, tokenizer, model, 512)
        return read_batches(self.source, tokenizer, model, self.max_tokens, size, self.batch_size)


def measured(
    names: list[str], text: Text, weights: dict[str, Any], place: str, *, hidden: bool, settings: dict[str, Any]
) -> "Iterator[Spectra]":
    """The spectra of each model on the tokens of the first, one model in memory at a time.

    Args:
        weights: further arguments of `load_body`.
        hidden: whether progress is.
        settings: further arguments of `measure_spectra`.
    """
    from ..analysis.spectra import measure_spectra
    from ..loading import load_body
    from .progress import progress

    batches: list[dict[str, Any]] = []
    for name in names:
        body = load_body(name, **weights)
        batches = batches or text.batches(name, body)
        with progress(f"analyzing {short_name(name)}", hidden=hidden) as on_batch:
            yield measure_spectra(body.to(place), batches, on_batch=on_batch, **settings)
        del body


def write_spectra(
    folder: Path, names: list[str], spectra: "list[Spectra]", what: dict[str, str], suggested: "SuggestedRanks | None"
) -> tuple[dict[str, Any], str]:
    """What is printed as JSON, and in words; everything is in `folder`."""
    from ..analysis.results import make_folder, write_analysis, write_comparison
    from ..provenance import describe_run

    make_folder(folder)
    if len(names) == 1:
        about = {"model": short_name(names[0]), **what}
        return write_analysis(folder, spectra[0], about, describe_run(), suggested)
    about = {"before": short_name(names[0]), "after": short_name(names[1]), **what}
    return write_comparison(folder, spectra[0], spectra[1], about, describe_run())


def show_health(run: str, folder: Path, as_json: bool) -> None:
    """health.png from a run's own logs; the last line of health.jsonl in words."""
    from ..analysis.health import read_health
    from ..analysis.results import has_matplotlib, make_folder
    from .common import print_json

    health, log = read_health(run)
    last = health[-1]
    make_folder(folder)
    if has_matplotlib():
        from ..analysis.plots import draw_health

        draw_health(health, log, folder / "health.png", f"Training health: {short_name(run)}")
    if as_json:
        print_json({"run": short_name(run), "logs": len(health), "last": last})
        return
    for key, label in (("b", "b"), ("increment_ratio", "|XAB| / |b Y|"), ("gradient_norm", "gradient norm")):
        values = [value for row in last[key].values() for value in row if value is not None]
        print(f"{label:14s} {min(values):.3g} to {max(values):.3g} at step {last['step']:,}")
    drifts = [line["recompute_drift"] for line in log if "recompute_drift" in line]
    print(f"drift          {max(drifts):.2g} at most" if drifts else "drift          not measured: no policy inverted")
    show_paths(folder)


def read_batches(
    source: "DataConfig", tokenizer: Any, model: Any, max_tokens: int, block_size: int, batch_size: int
) -> list[dict[str, Any]]:
    """Batches of the source's text. Raises ConfigError where the tokens are not the model's."""
    from ..analysis.text import text_batches
    from ..data import load_documents
    from ..errors import ConfigError

    documents = load_documents(source)
    batches = text_batches(
        (document["text"] for document in documents),
        tokenizer,
        max_tokens=max_tokens,
        block_size=block_size,
        batch_size=batch_size,
    )
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    if largest >= vocabulary:
        raise ConfigError(f"the tokenizer yields id {largest}, the model knows {vocabulary}; give its own tokenizer")
    return batches


def parse_size(text: str | None, name: str) -> int | None:
    """ "250k" -> 250000, "4G" or "4GB" -> 4000000000. Raises ConfigError."""
    from ..errors import ConfigError

    if text is None:
        return None
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([kmgb]?)b?", text.strip().lower())
    value = int(float(match[1]) * SIZES[match[2]]) if match else 0
    if value < 1:
        raise ConfigError(f"{name}={text!r} is not a size; give a number such as 250000, 250k, 1.5M or 4G")
    return value


def parse_ranks(text: str | None) -> list[int] | None:
    """ "16,64" -> [16, 64]. Raises ConfigError."""
    from ..errors import ConfigError

    if text is None:
        return None
    if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text):
        raise ConfigError(f"ranks={text!r}; give whole numbers with commas, such as 16,64,256")
    return [int(part) for part in text.split(",")]


def short_name(name: str) -> str:
    """The last part of a path or hub name that says something."""
    parts = [part for part in Path(name).parts if part not in ("/", ".", "..")]
    return next((part for part in reversed(parts) if part != "model"), "model") if parts else "model"


def show_paths(folder: Path) -> None:
    """The results in a folder, a line each."""
    for path in sorted(folder.glob("*.*")):
        if path.suffix in (".png", ".json", ".md"):
            print(path)
