"""`crosslayer plan`: what a training would cost, and how to run it on given devices."""

from typing import TYPE_CHECKING, Annotated

import typer

from .options import spelled

if TYPE_CHECKING:
    from typing import Any

    from ..accounting import Shape
    from ..accounting.plan import MemoryPlan


def plan(
    model: Annotated[
        str,
        typer.Option(
            help="llama_60m, 130m, 350m, 1b, 3b, 7b, 13b, 70b; a config.json, its folder, or a recipe (name or file)."
        ),
    ],
    method: Annotated[
        str, typer.Option(help="crnet, dense, cola, low_rank, galore, galore_8bit, apollo, ...")
    ] = "crnet",
    rank: Annotated[int | None, typer.Option(help="Rank [default: a quarter of the width; 8 for adapters].")] = None,
    gpu_memory: Annotated[str | None, spelled("gpu-memory", "Of each, as 80GB [default: the device's].")] = None,
    gpus: Annotated[int, typer.Option(help="Number of devices.")] = 1,
    device: Annotated[str | None, typer.Option(help="h100, h200, a100, rtx-4090, ... [default: h100].")] = None,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    tokens_per_step: Annotated[str, spelled("tokens-per-step", "Tokens of an optimizer step, as 1M.")] = "1M",
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of the training, as 20B [default: 20 per parameter of the dense model].")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="bf16_autocast (float32 weights), bf16 (everything) or float32.")
    ] = "bf16_autocast",
    utilisation: Annotated[float, typer.Option(help="Share of the device's peak that is reached.")] = 0.4,
    reserve: Annotated[float, typer.Option(help="Share of the memory that is left alone.")] = 0.08,
    tensor_parallel: Annotated[int, spelled("tensor-parallel", "Devices that split each layer.")] = 1,
    sharding: Annotated[str, typer.Option(help="auto (DDP where something fits, else FSDP), ddp or fsdp.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What fits, what it costs and how long it takes: arithmetic, on any machine.

    For example: crosslayer plan --model llama_7b --gpu-memory 80GB --gpus 8 --sequence 4096
    """
    from ..accounting.planner import make_plan, parse_bytes, parse_tokens
    from .common import print_json

    shape = read_model(model)
    found = make_plan(
        shape,
        method,
        name=model,
        rank=rank,
        device=device,
        gpu_memory=None if gpu_memory is None else parse_bytes(gpu_memory),
        gpus=gpus,
        sequence=sequence,
        tokens_per_step=parse_tokens(tokens_per_step, "tokens_per_step"),
        tokens=None if tokens is None else parse_tokens(tokens),
        precision=precision,
        utilisation=utilisation,
        reserve=reserve,
        tensor_parallel=tensor_parallel,
        sharding=sharding,
    )
    if as_json:
        print_json(found.to_dict())
    else:
        show(found)


def read_model(model: str) -> "Shape | dict[str, Any] | str":
    """A shape by its name, from a config.json or its folder, or from the model section of a recipe."""
    import json
    from pathlib import Path

    from ..accounting.shapes import Shape, named_shape
    from ..errors import ConfigError
    from ..recipes import shipped_recipes

    shipped = shipped_recipes().get(model)
    path = Path(model) if shipped is None else shipped.path
    if not (path.exists() or path.suffix in (".json", ".yaml", ".yml")):
        return named_shape(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            fields = json.loads(text)
            fields = {"model_type": "llama", **fields} if isinstance(fields, dict) else fields
        else:
            import yaml

            recipe = yaml.safe_load(text)
            fields = recipe.get("model") if isinstance(recipe, dict) else None
    except FileNotFoundError:
        raise ConfigError(f"model {model!r}: {path} does not exist; give a config.json or a recipe") from None
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"model {model!r} cannot be read: {error}") from None
    except Exception as error:
        raise ConfigError(f"model {model!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"model {model!r} holds no model: give a config.json, or a recipe with a model section")
    return Shape.of(fields)


def show(plan: "MemoryPlan") -> None:
    """Table of settings, the recommendation, its recipe lines, and the other methods."""
    import yaml
    from rich.console import Console
    from rich.table import Table

    from ..accounting.planner import show_bytes

    console = Console(highlight=False)
    rank = f", rank {plan.rank}" if plan.rank else ""
    console.print(
        f"{plan.model}, {plan.method}{rank}: {plan.parameters / 1e6:,.2f}M parameters"
        + (f", {plan.trainable / 1e6:,.2f}M trained" if plan.trainable != plan.parameters else "")
    )
    console.print(
        f"{plan.gpus} x {plan.device}, {show_bytes(plan.gpu_memory_bytes)} each, {show_bytes(plan.usable_bytes)} to "
        f"use; {plan.precision}, sequences of {plan.sequence:,} tokens; {plan.tokens / 1e9:,.3g}B tokens at "
        f"{plan.utilisation:.0%} of {plan.peak_flops / 1e12:,.0f} TFLOP/s\n"
    )
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for title in ("recompute", "micro-batch", "fits", "peak", "weights", "gradients", "optimizer", "activations"):
        table.add_column(title, justify="left" if title in ("recompute", "fits") else "right")
    for title in ("live", "logits", "temporary", "GFLOP/token", "tokens/s", "days", "device-hours"):
        table.add_column(title, justify="right")
    for setting in plan.settings:
        memory = [f"{setting.memory_bytes[part] / 1e9:.1f}" for part in setting.memory_bytes]
        table.add_row(
            setting.label,
            f"{setting.micro_batch} x {setting.accumulation}",
            "yes" if setting.fits else "no",
            f"{setting.peak_bytes / 1e9:.1f}",
            *memory,
            f"{sum(setting.operations_per_token.values()) / 1e9:,.1f}",
            f"{setting.tokens_per_s:,.0f}",
            f"{setting.days:,.1f}",
            f"{setting.device_hours:,.0f}",
        )
    console.print(table)
    console.print("GB on each device; micro-batch x accumulation on each\n", style="dim")
    best = plan.recommended
    sharding = "" if best.setting.sharding == "none" else f", {best.setting.sharding.upper()}"
    console.print(f"recommended: recompute {best.setting.label}, micro-batch {best.setting.micro_batch}{sharding}")
    console.print(f"because it is {best.reason}\n")
    if best.recipe:
        console.print(yaml.safe_dump(best.recipe, sort_keys=False))
    beside = Table(box=None, padding=(0, 1), header_style="bold")
    for title in ("beside it", "parameters", "recompute", "micro-batch", "peak GB", "tokens/s", "days", "device-hours"):
        beside.add_column(title, justify="left" if title in ("beside it", "recompute") else "right")
    refused = []
    for name, other in {plan.method: best, **plan.beside}.items():
        if isinstance(other, str):
            refused.append(other)
            continue
        setting = other.setting
        beside.add_row(
            name,
            f"{other.parameters / 1e6:,.1f}M",
            setting.label + ("" if setting.sharding == "none" else f", {setting.sharding.upper()}"),
            f"{setting.micro_batch} x {setting.accumulation}",
            f"{setting.peak_bytes / 1e9:.1f}",
            f"{setting.tokens_per_s:,.0f}",
            f"{setting.days:,.1f}",
            f"{setting.device_hours:,.0f}",
        )
    console.print(beside)
    for reason in refused:
        console.print(reason)
    console.print(
        "\nOne utilisation for all: methods with fewer operations reach less of the peak (docs/accounting.md). "
        "Communication is not counted.",
        style="dim",
    )
