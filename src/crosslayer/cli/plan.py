"""`crosslayer plan`: what a training would cost, and how to run it on given devices."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import spelled

if TYPE_CHECKING:
    from ..accounting import Shape


def plan(
    model: Annotated[
        str | None,
        typer.Option(
            help="llama_60m, 130m, 350m, 1b, 3b, 7b, 13b, 70b; a config.json, its folder, or a recipe (name or file) "
            "[default: every size, and what makes it fit]."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="crnet, dense, cola, low_rank, galore, galore_8bit, apollo, ...")
    ] = "crnet",
    rank: Annotated[int | None, typer.Option(help="Rank [default: a quarter of the width; 8 for adapters].")] = None,
    gpu_memory: Annotated[str | None, spelled("gpu-memory", "Of each, as 80GB [default: the device's].")] = None,
    gpus: Annotated[int, typer.Option(help="Number of devices.")] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="h100, h200, a100, rtx-4090, ..., or a file of `bench device` [default: h100]."),
    ] = None,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    tokens_per_step: Annotated[str, spelled("tokens-per-step", "Tokens of an optimizer step, as 1M.")] = "1M",
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of the training, as 20B [default: 20 per parameter of the dense model].")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="bf16_autocast (float32 weights), bf16 (everything), float32 or tf32.")
    ] = "bf16_autocast",
    optimizer: Annotated[
        str | None,
        typer.Option(help="adamw, adamw_8bit, muon or spectron, where AdamW trains [default: the method's]."),
    ] = None,
    gradient_release: Annotated[
        bool, spelled("gradient-release", "Step within the backward: one device, no accumulation.")
    ] = False,
    utilisation: Annotated[
        float | None,
        typer.Option(help="Share of the peak that all operations run at [default: each has its own time]."),
    ] = None,
    reserve: Annotated[float, typer.Option(help="Share of the memory that is left alone.")] = 0.08,
    tensor_parallel: Annotated[
        int | None, spelled("tensor-parallel", "Devices that split each layer [default: the fastest].")
    ] = None,
    fsdp: Annotated[
        int | None,
        typer.Option(help="Devices that share weights, gradients and states; 1 is DDP [default: the fastest]."),
    ] = None,
    micro_batch: Annotated[int | None, spelled("micro-batch", "Sequences on each [default: the fastest].")] = None,
    gpus_per_node: Annotated[int, spelled("gpus-per-node", "Devices of a node.")] = 8,
    bandwidth: Annotated[
        str | None,
        typer.Option(help="Bytes a second that each sends within a node, as 360GB [default: 0.8 of the data sheet]."),
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="The same to other nodes, as 40GB [default: 0.8 of the data sheet].")
    ] = None,
    no_overlap: Annotated[
        bool, spelled("no-overlap", "FSDP and DDP send after they have computed, not while they do.")
    ] = False,
    show_all: Annotated[bool, typer.Option("--all", help="Every setting that was looked at.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What fits, what it costs and how long it takes: arithmetic, on any machine.

    For example: crosslayer plan --model llama_7b --gpu-memory 80GB --gpus 64 --tensor-parallel 2 --sequence 4096

    Without a model, what can be trained on a card: crosslayer plan --gpu-memory 24GB --sequence 4096
    """
    from ..accounting.planner import make_plan, parse_bytes, parse_tokens
    from ..accounting.sizes import plan_sizes
    from .common import print_json
    from .plan_tables import show
    from .size_tables import show_sizes

    given: dict[str, Any] = {
        "rank": rank,
        "device": device,
        "gpu_memory": None if gpu_memory is None else parse_bytes(gpu_memory),
        "gpus": gpus,
        "sequence": sequence,
        "tokens_per_step": parse_tokens(tokens_per_step, "tokens_per_step"),
        "tokens": None if tokens is None else parse_tokens(tokens),
        "precision": precision,
        "optimizer": optimizer,
        "gradient_release": gradient_release,
        "utilisation": utilisation,
        "reserve": reserve,
        "tensor_parallel": tensor_parallel,
        "fsdp": fsdp,
        "micro_batch": micro_batch,
        "gpus_per_node": gpus_per_node,
        "bandwidth": None if bandwidth is None else parse_bytes(bandwidth, "bandwidth"),
        "network": None if network is None else parse_bytes(network, "network"),
        "overlap": not no_overlap,
    }
    if model is None:
        sizes = plan_sizes(method, everything=show_all, **given)
        print_json(sizes.to_dict()) if as_json else show_sizes(sizes)
        return
    found = make_plan(read_model(model), method, name=model, **given)
    print_json(found.to_dict()) if as_json else show(found, show_all)


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
