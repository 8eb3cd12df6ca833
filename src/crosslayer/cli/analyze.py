"""`crosslayer analyze`: cross-layer spectra of a model, ranks for CR-Net, the health of a run."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..analysis import Spectra

SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def analyze(
    model: Annotated[str | None, typer.Argument(help="Folder of a model or of a run, or a name on the hub.")] = None,
    before: Annotated[str | None, typer.Option(help="Compare two: the model before fine-tuning ...")] = None,
    after: Annotated[str | None, typer.Option(help="... and after it. Both read BEFORE's tokens.")] = None,
    health: Annotated[
        bool, typer.Option("--health", help="Draw the training health of MODEL, the folder of a CR-Net run.")
    ] = False,
    data: Annotated[
        str, typer.Option(help="python-library, a file, a folder, or hf:owner/name[:config].")
    ] = "python-library",
    text_column: Annotated[
        str, typer.Option("--text_column", "--text-column", help="Field that holds the text.")
    ] = "text",
    split: Annotated[str, typer.Option(help="Split of a hub dataset.")] = "train",
    max_tokens: Annotated[
        int, typer.Option("--max_tokens", "--max-tokens", help="Tokens to read; at least four times the widest output.")
    ] = 32_768,
    block_size: Annotated[
        int | None,
        typer.Option("--block_size", "--block-size", help="Longest piece in tokens [default: the model's, <= 512]."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", "--batch-size", help="Pieces at a time.")] = 8,
    ranks: Annotated[
        str | None, typer.Option(help="Ranks to report, such as 16,64,256 [default: powers of two and width / 4].")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Positions to look at, such as q,k,down [default: all].")
    ] = None,
    suggest_ranks: Annotated[
        bool, typer.Option("--suggest-ranks", "--suggest_ranks", help="Turn the spectra into a rank_pattern.")
    ] = False,
    rank_budget: Annotated[
        str | None,
        typer.Option(
            "--rank_budget",
            "--rank-budget",
            help="Parameters of all A and B, such as 250k [default: the CR-Net's own, else those of rank width / 4].",
        ),
    ] = None,
    rank_multiple: Annotated[
        int | None, typer.Option("--rank_multiple", "--rank-multiple", help="Step of the ranks [default: 8 at most].")
    ] = None,
    gram_memory: Annotated[
        str | None,
        typer.Option(
            "--gram_memory",
            "--gram-memory",
            help="Bytes of Gram matrices at a time, such as 4G; less means more passes over the text [default: a "
            "quarter of the weights, at least 256 MiB].",
        ),
    ] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="Draw the weights anew: what chance gives.")] = False,
    seed: Annotated[int, typer.Option(help="Of those weights.")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub name [default: the model's].")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16, float64.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 [default: CUDA where there is one].")] = None,
    output_dir: Annotated[
        str | None,
        typer.Option("--output_dir", "--output-dir", help="Folder of the results [default: runs/analysis/NAME]."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """How close to low rank the outputs of neighbouring layers are, in MODEL, on a text.

    For every layer and position: the error of the best rank-r approximation of Y_l, of Y_l - b0 Y_{l-1} and of
    Y_l - Y_{l-1}, cosines, stable, effective and energy ranks. Writes spectra.json, summary.md, curves.png and
    maps.png; ranks.png with --suggest-ranks, comparison.png with --before and --after, health.png with --health.
    """
    from ..errors import ConfigError
    from .common import print_json, quiet_libraries
    from .progress import progress

    given = [name for name, value in (("MODEL", model), ("--before", before), ("--after", after)) if value]
    for is_wrong, message in (
        (given not in (["MODEL"], ["--before", "--after"]), "give MODEL, or both --before and --after"),
        (health and not model, "--health wants MODEL, the folder of a CR-Net run"),
        (suggest_ranks and not model, "--suggest-ranks is for one MODEL, not for a comparison"),
        (suggest_ranks and health, "--suggest-ranks and --health exclude each other"),
        (
            bool(rank_budget or rank_multiple) and not suggest_ranks,
            "rank_budget and rank_multiple need --suggest-ranks",
        ),
    ):
        if is_wrong:
            raise ConfigError(message)
    budget, gram_bytes = parse_size(rank_budget, "rank_budget"), parse_size(gram_memory, "gram_memory")
    chosen_ranks = parse_ranks(ranks)
    name = short_name(model) if model else f"{short_name(before or '')}-{short_name(after or '')}"
    folder = Path(output_dir or f"runs/analysis/{name}")
    if health:
        show_health(str(model), folder, as_json)
        return

    quiet_libraries()
    from ..analysis.ranks import suggest_ranks as suggest
    from ..analysis.spectra import measure_spectra
    from ..data import DataConfig
    from ..data.fit import block_length
    from ..loading import load_body, load_text_tokenizer
    from .evaluate import choose_device

    place = choose_device(device)
    source = DataConfig(data=data, text_column=text_column, split=split, streaming=data.startswith("hf:"))
    names = [str(each) for each in ([model] if model else [before, after])]
    spectra: list[Spectra] = []
    batches: list[dict[str, Any]] = []
    for each in names:
        body = load_body(each, untrained=untrained, seed=seed, dtype=dtype)
        if not batches:
            text_tokenizer = load_text_tokenizer(tokenizer or each)
            size = block_length(block_size, text_tokenizer, body, 512)
            batches = read_batches(source, text_tokenizer, body, max_tokens, size, batch_size)
        with progress(f"analyzing {short_name(each)}", hidden=as_json) as on_batch:
            spectra.append(
                measure_spectra(
                    body.to(place),
                    batches,
                    ranks=chosen_ranks,
                    only=positions.split(",") if positions else None,
                    gram_bytes=gram_bytes,
                    on_batch=on_batch,
                )
            )
        del body

    # Imported late: they weigh as much as a small model, which is gone by now.
    from ..analysis.results import make_folder, write_analysis, write_comparison
    from ..provenance import describe_run

    what = {"text": data if source.data == "python-library" else Path(data).name, "device": place, "dtype": dtype}
    if untrained:
        what["weights"] = f"untrained, seed {seed}"
    suggested = suggest(spectra[0], budget, rank_multiple) if suggest_ranks else None
    make_folder(folder)
    if model:
        what = {"model": name, **what}
        content, words = write_analysis(folder, spectra[0], what, describe_run(), suggested)
    else:
        what = {"before": short_name(names[0]), "after": short_name(names[1]), **what}
        content, words = write_comparison(folder, spectra[0], spectra[1], what, describe_run())
    if as_json:
        print_json(content)
    else:
        print(words)
        show_paths(folder)


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


def read_batches(source, tokenizer, model, max_tokens: int, block_size: int, batch_size: int) -> list[dict[str, Any]]:
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
    for path in sorted(folder.glob("*.*")):
        if path.suffix in (".png", ".json", ".md"):
            print(path)
