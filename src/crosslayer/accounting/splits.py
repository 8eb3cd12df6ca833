"""Ways to split devices among tensor parallelism, FSDP and replicas, and what cannot be split."""

from ..crnet.split_rules import check_split
from ..errors import ConfigError
from .methods import OPTIMIZERS, Method
from .plan import Request
from .shapes import Shape
from .steps import Sharding


def list_splits(shape: Shape, trained: Method, request: Request) -> list[Sharding]:
    """Splits of the devices: as asked, else what is usual; only such as have a micro-batch for each replica.

    Tensor parallelism over 1, 2, 4, 8 devices of a node, where the model allows it; FSDP over none, over what is left
    of the node, over all that is left. Raises ConfigError where none is possible, with the reason.
    """
    found = []
    if _projects(trained) and (request.fsdp or 1) > 1:
        raise ConfigError(
            f"fsdp={request.fsdp}: {trained.optimizer} projects whole gradients, of which FSDP leaves a device its "
            "share; give 1"
        )
    for tensor in _tensor_sizes(shape, trained, request):
        left = request.gpus // tensor
        if request.fsdp is not None:
            sizes = [request.fsdp]
        elif _projects(trained):
            sizes = [1]
        else:
            of_node = max(1, request.links.node // tensor)
            sizes = sorted({1, left} | ({of_node} if left % of_node == 0 else set()))
        found += [Sharding(tensor=tensor, fsdp=size, replicas=left // size) for size in sizes]
    at_once = (request.micro_batch or 1) * request.sequence
    fewest = min(split.data for split in found) * at_once
    if request.tokens_per_step < fewest:
        batch = "one sequence" if request.micro_batch is None else f"micro_batch={request.micro_batch} sequences"
        raise ConfigError(
            f"tokens_per_step={request.tokens_per_step:,.0f} is less than {batch} of {request.sequence:,} tokens on "
            f"each of {fewest // at_once} replicas: give at least {fewest:,}, shorter sequences or fewer gpus"
        )
    return [split for split in found if split.data * at_once <= request.tokens_per_step]


def _projects(trained: Method) -> bool:
    return trained.optimizer.startswith(("galore", "apollo"))


def _tensor_sizes(shape: Shape, trained: Method, request: Request) -> list[int]:
    """Numbers of devices that may split a layer."""
    if request.tensor_parallel is not None:
        check_tensor_parallel(shape, trained, request.tensor_parallel)
        return [request.tensor_parallel]
    found = [1]
    for tensor in (2, 4, 8):
        try:
            check_tensor_parallel(shape, trained, tensor)
        except ConfigError:
            continue
        if tensor <= request.links.node and request.gpus % (tensor * (request.fsdp or 1)) == 0:
            found.append(tensor)
    return found


def check_tensor_parallel(shape: Shape, trained: Method, tensor: int) -> None:
    """Raises ConfigError where a layer cannot be split over so many devices: the rules of tensor_parallel.py."""
    if tensor == 1:
        return
    optimizer = trained.optimizer
    if shape.factorization == "sltrain" or trained.adapter is not None or optimizer not in OPTIMIZERS:
        what = (
            "adapters" if trained.adapter is not None else shape.factorization if optimizer in OPTIMIZERS else optimizer
        )
        instead = "" if _projects(trained) else ", and fsdp for more memory"
        raise ConfigError(f"tensor_parallel={tensor} is not known for {what}; give 1{instead}")
    try:
        for layer in shape.layers:
            places = {name: linear.position for name, linear in layer.linears.items()}
            check_split("this model", places, layer.attention, tensor)
    except ValueError as error:
        raise ConfigError(f"tensor_parallel={tensor}: {str(error).removesuffix('.')}") from None


__all__ = ["check_tensor_parallel", "list_splits"]
