"""A mixture of experts as one position of CR-Net: Y_l = b Y_{l-1} + sum_k w_k E_k(x).

The mixture carries as a whole, since an output of one token from one expert has no predecessor: the block below may
have sent the token elsewhere. Its experts' matrices are low rank, in transformers' grouped form: one product over all
experts. Letters: [B, T, D] batch, tokens, hidden size; S (token, expert) pairs, k experts a token, E experts, F their
width, r the rank.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import _grouped_linear

from .block import CrossLayerBlock
from .cross_layer_linear import GIVES_INCREMENT, b_of, starting_std
from .functions import Attention


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [S, in], its rows sorted by expert, with weight [E, out, in] -> [S, out].

    torch's grouped product has no float64, and wants rows of a multiple of 16 bytes; transformers' loop takes the rest.
    """
    aligned = all(width * weight.element_size() % 16 == 0 for width in weight.shape[1:])
    if weight.dtype == torch.float64 or not aligned:
        x = x.to(weight.dtype)
        return torch.ops.transformers.grouped_mm_fallback(x, weight.transpose(-2, -1), offs=ends)
    return _grouped_linear(x, weight, ends)


class LowRankExperts(nn.Module):
    """Gated MLPs whose gate, up and down are products of A and B: `gate_up_A` [E, 2r, D], `gate_up_B` [E, 2F, r],
    `down_A` [E, r, F], `down_B` [E, D, r]."""

    def __init__(self, mixture, hidden_size: int, rank: int, hidden_act: str, activation: str | None) -> None:
        super().__init__()
        experts, width = mixture.experts, mixture.width
        self.num_experts, self.rank, self.activation = experts, rank, activation
        self.gate_up_A = nn.Parameter(torch.empty(experts, 2 * rank, hidden_size))
        self.gate_up_B = nn.Parameter(torch.empty(experts, 2 * width, rank))
        self.down_A = nn.Parameter(torch.empty(experts, rank, width))
        self.down_B = nn.Parameter(torch.empty(experts, hidden_size, rank))
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [tokens, D], chosen experts [tokens, k] and their weights -> [tokens, D]."""
        experts, order = torch.sort(chosen.reshape(-1))
        counts = torch.histc(experts.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)  # of each expert's rows

        low_rank = self._activated(grouped_linear(x[order // chosen.shape[-1]], self.gate_up_A, ends))
        gate, up = (
            grouped_linear(T.contiguous(), B, ends)
            for T, B in zip(low_rank.chunk(2, -1), self.gate_up_B.chunk(2, 1), strict=True)
        )
        low_rank = self._activated(grouped_linear(self.act_fn(gate) * up, self.down_A, ends))
        outputs = grouped_linear(low_rank, self.down_B, ends) * weights.reshape(-1)[order].unsqueeze(-1)
        return outputs[torch.argsort(order)].view(*chosen.shape, -1).sum(1).to(x.dtype)

    def _activated(self, low_rank: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(low_rank) if self.activation == "silu" else low_rank


class CrossLayerMixture(nn.Module):
    """Router and experts of one block; with `beta` where the block builds on the one below.

    Args:
        router: x [tokens, D] -> (logits [tokens, E], weights [tokens, k], chosen experts [tokens, k]); its
            `weights_of` gives the weights of experts that were chosen before.
        experts: (x, chosen, weights) -> [tokens, D].
        beta: (init, epsilon, trainable), or None.
    """

    def __init__(self, router: Any, experts: nn.Module, beta: tuple | None) -> None:
        super().__init__()
        self.gate: Any = router
        self.experts = experts
        if beta is not None:
            self.beta_init, self.beta_epsilon, trainable = beta
            self.beta = nn.Parameter(torch.full((1,), float(self.beta_init)), requires_grad=trainable)

    def b(self) -> torch.Tensor:
        """s(beta) (|beta| + eps), shape [1], never zero."""
        return b_of(self.beta, self.beta_epsilon)

    def choice(self, x: torch.Tensor) -> torch.Tensor:
        """The experts of each token, [tokens, k]."""
        return self.gate(x.view(-1, x.shape[-1]))[2]

    def increment(self, x: torch.Tensor, choice: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, D] -> (the mixture [B, T, D], router logits [tokens, E]); with the experts chosen here or before."""
        flat = x.reshape(-1, x.shape[-1])
        logits, weights, chosen = self.gate(flat)
        if choice is not None:
            weights, chosen = self.gate.weights_of(logits, choice), choice
        return self.experts(flat, chosen, weights).view_as(x), logits

    def forward(self, x: torch.Tensor, previous: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, T, D] and the block below's Y -> (Y [B, T, D], router logits [tokens, E])."""
        increment, logits = self.increment(x)
        return increment if previous is None else self.b() * previous + increment, logits


GIVES_INCREMENT.add(CrossLayerMixture)


class RouterLogits(nn.Identity):
    """What transformers records when `output_router_logits` asks for it."""


class MixtureBlock:
    """Of a block with a mixture: its router's logits go where they are recorded."""

    def hand_out(self, beside) -> None:
        """Router logits [tokens, E] to the module where transformers records them."""
        for logits in beside:
            self.router_logits(logits)  # type: ignore[attr-defined]


class MixtureModel:
    """Of a family with mixtures: what transformers records and chooses, and how mixtures start."""

    _can_record_outputs = {"hidden_states": CrossLayerBlock, "attentions": Attention, "router_logits": RouterLogits}

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers reads it out of the modelling file, where its dense experts are only imported

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        init_mixture(module, self.config)  # type: ignore[attr-defined]


def build_mixture(config, layer_idx: int, router: nn.Module, dense_experts: type[nn.Module]):
    """The mixture of a block at position "experts": of dense or of low-rank experts, as the configuration says."""
    place, rank = config.places(layer_idx)["experts"], config.linear_rank(layer_idx, "experts")
    if rank is None:
        experts = dense_experts(config)
    else:
        activation = "silu" if config.factorization == "cola" else config.increment_activation
        experts = LowRankExperts(place.mixture, place.in_features, rank, config.hidden_act, activation)
    builds = place.carries and layer_idx > 0 and not config.starts_chain(layer_idx, "experts")
    beta = (config.beta_init, config.beta_epsilon, config.beta_trainable) if builds else None
    return CrossLayerMixture(router, experts, beta)


@torch.no_grad()
def init_mixture(module: nn.Module, config) -> None:
    """Routers and dense experts as transformers; low-rank ones as `_init_weights` does linears, B = 0 if they carry."""
    if isinstance(module, CrossLayerMixture):
        std = config.initializer_range
        init.normal_(module.gate.weight, std=std)
        for buffer in module.gate.buffers():  # of DeepSeek's router: what balances its experts
            init.zeros_(buffer)
        if hasattr(module, "beta"):
            init.constant_(module.beta, module.beta_init)
        if not isinstance(module.experts, LowRankExperts):
            init.normal_(module.experts.gate_up_proj, std=std)
            init.normal_(module.experts.down_proj, std=std)
            return
        experts, width = module.experts, module.experts.down_A.shape[-1]
        hidden_size, rank = experts.down_B.shape[1], experts.rank
        balanced = starting_std(config, hidden_size, width, rank)
        init.normal_(experts.gate_up_A, std=balanced)
        init.normal_(experts.gate_up_B, std=balanced)
        if hasattr(module, "beta"):
            init.normal_(experts.down_A, std=width**-0.5)
            init.zeros_(experts.down_B)
        else:
            init.normal_(experts.down_A, std=balanced)
            init.normal_(experts.down_B, std=balanced)
