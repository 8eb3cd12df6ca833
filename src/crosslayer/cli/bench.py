"""`crosslayer bench`: what methods cost at one shape, in memory and in time, and how fast a device is."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .common import help_without_arguments
from .options import Device, spelled
from .ranges import checked

if TYPE_CHECKING:
    from ..bench.contenders import Contenders
    from ..bench.rows import MemoryRow, RelativeTiming, SpeedResult

Column = Literal["parameters", "gradients", "optimizer", "activations", "temporary", "total"]
bench = typer.Typer(rich_markup_mode=None, invoke_without_command=True)


@bench.callback()
def choose(context: typer.Context) -> None:
    """Measure methods at one shape, memory and speed, or the device at hand."""
    help_without_arguments(context)


Methods = Annotated[
    str | None, typer.Option(help="Comma-separated; see the list below [default: all but the last three].")
]
VocabSize = Annotated[int, spelled("vocab_size", "Vocabulary.")]
HiddenSize = Annotated[int, spelled("hidden_size", "Width h.")]
IntermediateSize = Annotated[int | None, spelled("intermediate_size", "Width of the MLP [default: 2.69 h].")]
Heads = Annotated[int | None, spelled("num_attention_heads", "Heads [default: h / 64].")]
Rank = Annotated[int | None, typer.Option(help="Rank of the low-rank models [default: h / 4].")]
Interval = Annotated[
    int | None,
    spelled("recompute_interval", "Full state every so many layers [default: the policy's]."),
]
Batch = Annotated[int, spelled("batch_size", "Sequences in a step.")]
Sequence = Annotated[int, typer.Option(help="Tokens in a sequence.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or mixed: float32 weights under bf16 autocast.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
METHODS_HELP = """Methods: llama (transformers' own, always among them), dense, dense_checkpointing, cola, crnet (policy
none), crnet_invert, crnet_replay, crnet_reversible; cola_checkpointing, cola_invert, low_rank."""


@bench.command(epilog=METHODS_HELP)
@checked
def memory(
    methods: Methods = None,
    vocab_size: VocabSize = 1024,
    hidden_size: HiddenSize = 256,
    intermediate_size: IntermediateSize = None,
    layers: Annotated[str, typer.Option(help="Two depths or more, comma-separated; the peak is of the last.")] = "4,16",
    num_attention_heads: Heads = None,
    rank: Rank = None,
    recompute_interval: Interval = None,
    batch_size: Batch = 2,
    sequence: Sequence = 128,
    dtype: Dtype = "float32",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Saved activations by layer and method, their growth with depth, and the peak of a training step by part.

    Everything is counted, not timed: a laptop gives the same bytes as a server.
    """
    from ..errors import ConfigError
    from ..ranges import SIZE
    from .common import print_json, quiet_libraries

    try:
        depths = sorted({int(depth) for depth in layers.split(",")})
    except ValueError:
        raise ConfigError(f"layers={layers!r}; give numbers of layers such as 4,16") from None
    if len(depths) < 2:
        raise ConfigError(
            f"layers={layers!r}; give two different depths such as 4,16: growth is the slope between them"
        )
    if not all(SIZE.holds(depth) for depth in depths):
        raise ConfigError(f"layers={layers!r}; each must be {SIZE.words}")
    quiet_libraries()
    from ..bench.memory import memory_rows, saved_by_depth
    from ..bench.speed import measure_memory

    shape = _shape(vocab_size, hidden_size, intermediate_size, depths[-1], num_attention_heads, rank, sequence)
    contenders = _contenders(shape, methods, recompute_interval, dtype, device)
    options = {"device": contenders.device, "dtype": dtype, "interval": recompute_interval}
    saved = saved_by_depth(shape, contenders.methods, depths, batch=batch_size, sequence=sequence, **options)
    rows = memory_rows(saved, hidden_size)
    for name, peak in measure_memory(contenders, contenders.tokens(batch_size, sequence)).items():
        rows[name]["peak_bytes"] = peak
    if as_json:
        what = "activation memory, counted; peak of a training step (AdamW) by part"
        print_json(_context(what, contenders, batch_size, sequence) | {"depths": depths, "contenders": rows})
        return
    _print_memory(rows, depths, hidden_size, batch_size * sequence)


@bench.command(epilog=METHODS_HELP)
@checked
def speed(
    methods: Methods = None,
    vocab_size: VocabSize = 1024,
    hidden_size: HiddenSize = 512,
    intermediate_size: IntermediateSize = None,
    num_hidden_layers: Annotated[int, spelled("num_hidden_layers", "Layers.")] = 8,
    num_attention_heads: Heads = None,
    rank: Rank = None,
    recompute_interval: Interval = None,
    batch_size: Batch = 4,
    sequence: Sequence = 256,
    dtype: Dtype = "float32",
    parts: Annotated[str, typer.Option(help="Which of training,generation,memory.")] = "training,generation,memory",
    turns: Annotated[int, typer.Option(help="Counted turns of each contender.")] = 8,
    warm_up: Annotated[int, spelled("warm_up", "Turns before, not counted.")] = 2,
    decode_batch: Annotated[int, spelled("decode_batch", "Sequences of prefill and decode.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, spelled("new_tokens", "Tokens decoded in a turn.")] = 32,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Tokens per second of training, prefill and decode, and memory by part.

    Contenders take turns in one process; medians, with the 20th and 80th percentile in the JSON. Ratios are to
    transformers' Llama of the same shape.
    """
    from .common import print_json, quiet_libraries

    chosen = [part.strip() for part in parts.split(",")]
    quiet_libraries()
    from ..bench.speed import measure_generation, measure_memory, measure_training

    longest = max(sequence, prompt + new_tokens)
    shape = _shape(vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, rank, longest)
    contenders = _contenders(shape, methods, recompute_interval, dtype, device)
    ids = contenders.tokens(batch_size, sequence)
    result: SpeedResult = {}
    if "training" in chosen:
        result["training"] = measure_training(contenders, ids, turns=turns, warm_up=warm_up)
    if "memory" in chosen:
        result["memory"] = measure_memory(contenders, ids)
    if "generation" in chosen:
        lengths: dict[str, Any] = {"batch": decode_batch, "prompt": prompt, "new_tokens": new_tokens}
        result["generation"] = measure_generation(contenders, **lengths, turns=turns, warm_up=warm_up)
    if as_json:
        what = "tokens per second, interleaved in one process: medians, 20th and 80th percentile"
        context = _context(what, contenders, batch_size, sequence)
        print_json(context | {"turns": turns, "warm_up": warm_up, **result})
        return
    _print_speed(contenders.methods, result)


@bench.command("device")
@checked
def measure_device(
    output: Annotated[
        str | None, typer.Option(help="File to write, for `plan --device` [default: print the JSON].")
    ] = None,
    dtypes: Annotated[
        str | None, typer.Option(help="Some of float32,tf32,bfloat16 [default: all that the device has].")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """How fast the device at hand is: products by shape and dtype, attention, memory bandwidth, launches.

    It takes less than 30 seconds and wants the machine for itself. A CPU is measured with the threads that
    OMP_NUM_THREADS allows. For example: crosslayer bench device --output device.json
    """
    from pathlib import Path

    from ..bench import device as measuring
    from ..errors import ConfigError
    from .common import print_json
    from .evaluate import choose_device

    path = None if output is None else Path(output).expanduser()
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"output={output!r} is a folder, or lies in none; give a file in a folder that is there")
    names = None if dtypes is None else [name.strip() for name in dtypes.split(",")]
    rates = measuring.measure_device(choose_device(device), names)
    if path is not None:
        measuring.write_rates(rates, path)
    if path is None or as_json:
        print_json(rates.to_dict())
        return
    peaks = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in rates.peak.items())
    print(f"{rates.device}, {rates.kind}: GFLOP/s of the fastest product: {peaks}")
    print(f"{rates.bandwidth['float32'] / 1e9:,.1f} GB/s; {1e6 * rates.launch:.1f} us from kernel to kernel")
    print(f"wrote {output}; use it with: crosslayer plan --device {output}")


def _shape(
    vocabulary: int,
    hidden: int,
    intermediate: int | None,
    layers: int,
    heads: int | None,
    rank: int | None,
    sequence: int,
) -> dict[str, int | None]:
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate or max(8, round(2.69 * hidden / 8) * 8),
        "num_hidden_layers": layers,
        "num_attention_heads": heads or max(1, hidden // 64),
        "max_position_embeddings": sequence,
        # Ids that small vocabularies do not have; nothing here ends or pads a text.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return shape if rank is None else shape | {"rank": rank}


def _contenders(
    shape: dict[str, int | None], methods: str | None, interval: int | None, dtype: str, device: str | None
) -> "Contenders":
    from ..bench.contenders import DEFAULT_METHODS, REFERENCE, Contenders
    from .evaluate import choose_device

    names = list(dict.fromkeys([REFERENCE, *methods.split(",")])) if methods else DEFAULT_METHODS
    return Contenders(shape, names, device=choose_device(device), dtype=dtype, interval=interval)


def _context(what: str, contenders: "Contenders", batch: int, sequence: int) -> dict[str, Any]:
    from ..bench.contenders import LOSS
    from ..provenance import describe_run

    return {
        "what": what,
        "run": describe_run(),
        "loss": LOSS,
        "shape": {**contenders.shape, "batch": batch, "sequence": sequence},
        "device": contenders.device,
        "dtype": contenders.dtype,
        "recompute_interval": contenders.interval,
    }


def _print_memory(rows: "dict[str, MemoryRow]", depths: list[int], hidden_size: int, tokens: int) -> None:
    from .common import print_grid

    columns: tuple[Column, ...] = ("parameters", "gradients", "optimizer", "activations", "temporary", "total")
    print(
        f"Kept for the backward, KB per token; growth per layer in float32 numbers of the hidden size ({hidden_size})\n"
    )
    kept = [
        [
            row["label"],
            *(f"{row['depths'][str(d)]['bytes_per_token'] / 1e3:,.1f}" for d in depths),
            f"{row['growth_h']:.2f}h",
        ]
        for row in rows.values()
    ]
    print_grid(["", *(f"{depth} layers" for depth in depths), "growth"], kept)
    print(f"\nPeak of a training step with AdamW, {tokens:,} tokens, {depths[-1]} layers, MB by part\n")
    peaks = [[row["label"], *(f"{row['peak_bytes'][c] / 1e6:,.1f}" for c in columns)] for row in rows.values()]
    print_grid(["", *columns], peaks)


def _print_speed(methods: list[str], result: "SpeedResult") -> None:
    from ..methods import METHODS
    from .common import print_grid

    header, rows = [""], [[METHODS[name]] for name in methods]
    if "training" in result:
        header += ["training tokens/s", "over Llama", "by operations alone"]
    if "memory" in result:
        header += ["peak MB", "activations MB"]
    if "generation" in result:
        header += ["prefill tokens/s", "over Llama", "decode tokens/s", "over Llama"]
    for name, row in zip(methods, rows, strict=True):
        if "training" in result:
            training = result["training"][name]
            row += [*_speed_cells(training), f"{training['speed_if_operations_decided']:.2f}"]
        if "memory" in result:
            peak = result["memory"][name]
            row += [f"{size / 1e6:,.1f}" for size in (peak["total"], peak["activations"])]
        if "generation" in result:
            measured = result["generation"].get(name)
            row += _speed_cells(measured and measured["prefill"]) + _speed_cells(measured and measured["decode"])
    print_grid(header, rows)


def _speed_cells(row: "RelativeTiming | None") -> list[str]:
    """Nothing where another method of the same model was measured: generation does not depend on the policy."""
    if row is None:
        return ["", ""]
    return [f"{row['tokens_per_s']:,.0f}", f"{row['speed_over_llama']:.2f}"]
