"""Tensor parallelism of a block, for two to four devices of one node: transformers' `tp_plan="auto"`.

    q, k, v, gate, up   A replicated, B split by columns, heads staying whole      Y and its gradient: this rank's slice
    o, down             A split by rows, T summed over the ranks, B replicated     Y, h, gradients: the same everywhere
    first layer         dense, as Megatron does it (arXiv 1909.08053): its outputs lie in the same places

Summed over the ranks, per token and layer: T of o and down in the forward (2r), dT of the other five in the backward
(5r); Megatron's dense block sums 4h. Inversion and replay need no communication: a slice of Y and a whole T suffice.
beta of a position that is split has a partial gradient on every rank, <G, Y_{l-1}> of a slice: it is summed inside its
backward, so that accumulated gradients count once. (The layout is our choice, from where a low-rank sum is narrowest.)

The weights are DTensors between calls, so that transformers loads, saves and clips them; products see this rank's part.
Letters: [B, T, D] batch, tokens, hidden size; F the output width of a position, r the rank; h hidden states.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import TensorParallelLayer

from .cross_layer_linear import GIVES_INCREMENT, CrossLayerLinear, LowRankLinear, is_watched
from .functions import Attention, CarriedOffsetRMSNorm, CarriedRMSNorm
from .product import PRODUCTS, Product
from .split_rules import COLUMNS, check_split


class _Copy(torch.autograd.Function):
    """x as it is; its gradient, of which every rank has a part, summed over them."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        d = d.contiguous().clone()
        dist.all_reduce(d, group=ctx.group)
        return d, None


class _Sum(torch.autograd.Function):
    """The sum over the ranks of x, of which every one has a part; its gradient as it is."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group) -> torch.Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, d):
        return d, None


def local(weight: torch.Tensor | None) -> torch.Tensor | None:
    """This rank's part of a weight; its gradient goes to the whole one."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@dataclass(frozen=True)
class Split:
    """How a linear is split: its outputs over the ranks of `mesh` (`by_columns`), or its inputs."""

    mesh: Any
    by_columns: bool

    @property
    def group(self):
        """The process group of the ranks."""
        return self.mesh.get_group()

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """x, whose gradient is summed over the ranks where outputs are split; Megatron-LM's f (arXiv 1909.08053)."""
        return _Copy.apply(x, self.group) if self.by_columns else x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """x summed over the ranks where inputs are split; Megatron-LM's g."""
        return x if self.by_columns else _Sum.apply(x, self.group)

    def shard(self, module: nn.Module, name: str, dim: int) -> None:
        """Puts a DTensor in place of a parameter of the module: this rank keeps its part."""
        whole = module._parameters.get(name)
        if whole is not None:
            part = distribute_tensor(whole.detach(), self.mesh, [Shard(dim)], src_data_rank=None)
            module._parameters[name] = nn.Parameter(part, requires_grad=whole.requires_grad)


# Linears of which a rank holds a part; they stand in for the class of the one that is split


class SplitLinear(nn.Linear):
    """A dense linear."""

    split: Split

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, in] -> [B, T, out]; the split one of both is this rank's part."""
        if self.split.by_columns:
            return nn.functional.linear(self.split.copy(x), local(self.weight), local(self.bias))  # type: ignore[arg-type]
        y = self.split.sum(nn.functional.linear(x, local(self.weight)))  # type: ignore[arg-type]
        return y if self.bias is None else y + self.bias


class SplitFactors(LowRankLinear):
    """What linears of two factors do alike."""

    split: Split

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """T = X A, whole on every rank: [B, T, in] -> [B, T, r]."""
        if self.split.by_columns:
            return self.split.copy(super().low_rank(x))
        check_plain(self.A)
        low_rank = self.split.sum(nn.functional.linear(x, local(self.A.weight)))  # type: ignore[arg-type]
        return nn.functional.silu(low_rank) if self.activation == "silu" else low_rank

    def increment(self, x: torch.Tensor) -> torch.Tensor:
        """T B: [B, T, in] -> [B, T, F], of which a rank has a part where outputs are split."""
        low_rank = self.low_rank(x)
        if not self.split.by_columns:
            return self.B(low_rank)
        check_plain(self.B)
        return nn.functional.linear(low_rank, local(self.B.weight), local(self.B.bias))  # type: ignore[arg-type]


class SplitLowRankLinear(SplitFactors):
    """A linear of two factors."""


class SplitCrossLayerLinear(SplitFactors, CrossLayerLinear):
    """A cross-layer linear."""

    def forward(self, x: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """b Y_{l-1} + X A B on this rank's part of Y."""
        return self.split.copy(self.b()) * previous + self.increment(x)


def check_plain(factor: nn.Module) -> None:
    """Raises RuntimeError where something stands in for a factor that is split."""
    if type(factor) is not nn.Linear or is_watched(factor):
        raise RuntimeError(
            f"A {type(factor).__name__} stands in for a factor that tensor parallelism has split: adapters and hooks "
            "on it would see a part of it. Train them without tensor parallelism (FSDP2 shards them)."
        )


class SplitRMSNorm(CarriedRMSNorm):
    """A norm over each of this rank's heads: its weight is whole, its gradient a part."""

    split: Split

    def scale(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [D of a head]; its gradient is summed over the ranks."""
        return self.split.copy(super().scale(dtype))


class SplitOffsetRMSNorm(SplitRMSNorm, CarriedOffsetRMSNorm):
    """The same with a weight of 1 + w."""


class SplitProduct(Product):
    """The product of a linear that is split, for the memory policies: the sums above, on plain tensors."""

    def __init__(self, name: str, linear: Any, b: float | None, autocast_dtype: torch.dtype | None) -> None:
        super().__init__(name, linear, b, autocast_dtype)
        self.split: Split = linear.split
        self.whole = {f"{self.last_name}.weight": self.weight, f"{self.last_name}.bias": self.bias}
        self.whole[f"{name}.A.weight"] = self.A
        self.A, self.bias = local(self.A), local(self.bias)
        self.weight = local(self.weight)  # type: ignore[assignment]

    @staticmethod
    def fits(linear: Any, parameters: dict[str, torch.Tensor]) -> bool:
        """Always; raises RuntimeError where something stands in for a factor."""
        for factor in (linear.A, linear.B) if isinstance(linear, LowRankLinear) else ():
            check_plain(factor)
        return True

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """X, or T = X A, whole."""
        U = super().first(x)
        return U if self.A is None else self._summed(U, not self.split.by_columns)

    def output(self, U: torch.Tensor) -> torch.Tensor:
        """The linear's output from `first`'s; summed over the ranks where a dense linear's inputs are split."""
        if self.split.by_columns or self.A is not None:
            return super().output(U)
        y = self._summed(nn.functional.linear(U, self.weight.to(self.dtype)), True)
        return y if self.bias is None else y.add_(self.bias)

    def _summed(self, part: torch.Tensor, is_part: bool) -> torch.Tensor:
        if is_part:
            dist.all_reduce(part, group=self.split.group)
        return part

    def whole_gradient(self, part: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """dT, or db, summed over the ranks where each has a part of it."""
        return self._summed(part, self.split.by_columns)

    def backward(self, G, x, U, dx, add: bool, found) -> None:
        """As `Product.backward`; gradients of weights that are split are DTensors, as these are."""
        if self.A is None and self.split.by_columns:
            part = torch.empty_like(dx)
            super().backward(G, x, U, part, False, found)
            self._summed(part, True)
            dx.add_(part) if add else dx.copy_(part)
        else:
            super().backward(G, x, U, dx, add, found)
        for name, weight in self.whole.items():
            if isinstance(weight, DTensor) and name in found.found:
                gradient = found.found[name].contiguous()
                found.found[name] = DTensor.from_local(gradient, weight.device_mesh, weight.placements, run_check=False)


SPLIT: dict[type, type] = {
    nn.Linear: SplitLinear,
    LowRankLinear: SplitLowRankLinear,
    CrossLayerLinear: SplitCrossLayerLinear,
    CarriedRMSNorm: SplitRMSNorm,
    CarriedOffsetRMSNorm: SplitOffsetRMSNorm,
}
PRODUCTS |= dict.fromkeys((SplitLinear, SplitLowRankLinear, SplitCrossLayerLinear), SplitProduct)
GIVES_INCREMENT.add(SplitCrossLayerLinear)


# Splitting a model


def check_distribution(config: Any) -> None:
    """Raises ValueError for pipelines: transformers would cut the model and hand on the hidden states alone."""
    if getattr(config, "pp_size", 1) > 1:
        raise ValueError(
            f"pp_size={config.pp_size}: a stage of a CR-Net would have to pass on every carried Y, which pipelines of "
            "transformers do not. Use fsdp_size or tp_size."
        )


class BlockParallel(TensorParallelLayer):
    """The style "crosslayer_block" of transformers' plans."""

    def install_forward(self, module, mesh):
        """Called by transformers for each block."""
        split_block(module, mesh)
        return module


ALL_PARALLEL_STYLES.register("crosslayer_block", BlockParallel())


def split_block(block: Any, mesh: Any) -> None:
    """Splits the linears of a decoder block over the ranks of `mesh`, before or after its weights are there.

    Raises ValueError for a block, or a number of ranks, that this cannot be done for.
    """
    ranks = mesh.size()
    attention = check_block(block, ranks)
    shape = attention.config.attention_shape(attention.layer_idx)
    shares_keys = shape.key_value_heads % ranks != 0
    for name in block.places:
        if shares_keys and name in ("k", "v"):
            continue  # whole on every rank
        linear, split = block.linear(name), Split(mesh, by_columns=name in COLUMNS)
        linear.__class__, linear.split = SPLIT[type(linear)], split
        factors = isinstance(linear, LowRankLinear)
        if split.by_columns:
            last = linear.B if factors else linear
            split.shard(last, "weight", 0)
            split.shard(last, "bias", 0)
        else:
            split.shard(linear.A if factors else linear, "weight", 1)
    norms = ["q_norm"] if shares_keys else ["q_norm", "k_norm"]
    for norm in (getattr(attention, name) for name in norms if hasattr(attention, name)):
        norm.__class__, norm.split = SPLIT[type(norm)], Split(mesh, by_columns=True)
    if shares_keys:
        share_keys(attention, shape, Split(mesh, by_columns=True))


def check_block(block: Any, ranks: int) -> Attention:
    """The attention of a block that can be split over so many ranks; raises ValueError for others."""
    name = type(block).__name__
    attention = next(module for module in block.modules() if isinstance(module, Attention))
    check_split(name, block.places, attention.config.attention_shape(attention.layer_idx), ranks)
    norms = [getattr(attention, norm, None) for norm in ("q_norm", "k_norm")]
    if any(norm is not None and type(norm) not in SPLIT for norm in norms):
        raise ValueError(f"tensor parallelism does not know the norms of queries and keys in {name}. Use FSDP2.")
    return attention


def share_keys(attention: Any, shape: Any, split: Split) -> None:
    """Fewer key-value heads than ranks: all are computed everywhere, and each rank attends to the one of its queries.

    Sliced after the rotation, where the gradient of the heads is summed; so the linears of k and v, and a norm of the
    keys, have whole gradients.
    """
    ranks, prepare = split.mesh.size(), attention.prepare
    attention.num_key_value_groups = shape.heads // ranks
    at = split.mesh.get_local_rank() * shape.key_value_heads // ranks

    def prepare_own(*outputs: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, ...]:
        query, key, value = prepare(*outputs, **arguments)
        return query, *(split.copy(x)[:, at : at + 1] for x in (key, value))

    attention.prepare = prepare_own
