"""Keys and values of a CR-Net kept as X A: r numbers for each instead of its width, from the second layer on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from ..crnet.cross_layer_linear import CrossLayerLinear
from ..crnet.functions import carry_dtype
from ..errors import ConfigError

READS = ("q", "k", "v")
"""What attention with keys and values of its own reads."""
POSITIONS = "position_ids"


class LowRankCache(DynamicCache):
    """A dynamic cache that can be put away: for prompts that are kept, moved off the device or saved.

        cache = LowRankCache(model)
        with cache.recording():
            model(prompt, past_key_values=cache)        # or generate
        cache.compress(device="cpu")                    # X A of k and v; Y_k and Y_v of the first layer
        cache.restore()                                 # K_l = b_l K_{l-1} + (X_l A_l) B_l, then norms and rotations
        model.generate(prompt_and_more, past_key_values=cache)

    It holds [B, T, r] of k and of v for every layer that carries them, [B, T, width] for one that starts a chain, in
    the model's dtype. Restored keys and values are those of the forward to rounding. The recurrence is CR-Net's own
    (arXiv 2509.18993); keeping a cache by it is our choice (docs/inference.md says when it pays).

    Args:
        model: a CR-Net whose attention reads k and v (`factorization="cross_layer"`, not DeepSeek-V3).

    Raises ConfigError for another model.
    """

    def __init__(self, model: Any) -> None:
        body = getattr(model, "base_model", model)
        blocks = getattr(body, "blocks", [])
        if not any(isinstance(block.linear("k"), CrossLayerLinear) for block in blocks if "k" in block.places):
            raise ConfigError(
                f"a {type(model).__name__} carries no keys from layer to layer; give a CR-Net whose attention reads "
                'k and v (factorization="cross_layer")'
            )
        super().__init__(config=model.config)
        self.body = body
        self.kept: dict[str, list[torch.Tensor]] = {}
        self.is_compressed = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, what the model computes is recorded; the model may run with this cache alone."""

        def keep(name: str) -> Any:
            return lambda module, inputs, output: self.kept.setdefault(name, []).append(output.detach())

        def keep_positions(module: Any, inputs: tuple, arguments: dict) -> None:
            self.kept.setdefault(POSITIONS, []).append(arguments[POSITIONS])

        handles = [self.body.blocks[0].register_forward_pre_hook(keep_positions, with_kwargs=True)]
        for name, linear in self._linears():
            module = linear.A if isinstance(linear, CrossLayerLinear) else linear
            handles.append(module.register_forward_hook(keep(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def compress(self, device: str | torch.device | None = None) -> None:
        """Puts keys and values away as what was recorded, on `device` (None: where it is).

        Raises ConfigError where tokens went in outside of `recording`, or the batch was reordered.
        """
        length = self.get_seq_length()
        self.kept = {name: [torch.cat(parts, 1).to(device)] for name, parts in self.kept.items()}
        if not length or any(parts[0].shape[1] != length for parts in self.kept.values()):
            raise ConfigError(
                f"the cache has {length} tokens, not those that were recorded; run the model within cache.recording()"
            )
        for layer in self.layers:
            layer.reset()
        self.is_compressed = True

    @torch.no_grad()
    def restore(self) -> None:
        """Makes keys and values anew, where the model is. What was recorded stays, so that more may follow."""
        self.is_compressed = False
        device = self.body.device
        self.kept = {name: [parts[0].to(device)] for name, parts in self.kept.items()}
        embedding = self.body.get_input_embeddings().weight[None, :1]  # for its dtype and device
        rotations = self.body.rotations(embedding, self.kept[POSITIONS][0])
        Y: dict[str, torch.Tensor] = {}
        for index, block in enumerate(self.body.blocks):
            for name in READS[1:]:
                linear, (kept,) = block.linear(name), self.kept[f"{index}.{name}"]
                carries = isinstance(linear, CrossLayerLinear)
                y = linear.carry(linear.activate(kept), Y[name]) if carries else kept
                Y[name] = y.to(carry_dtype(y.dtype))
            attention = block.find(next(stage.function for stage in block.stages if stage.reads == READS))
            y_k, y_v = (Y[name].to(kept.dtype) for name in READS[1:])
            kind = rotations[self.body.config.layer_kind(index)] if isinstance(rotations, dict) else rotations
            y_q = y_k.new_zeros(()).expand(*y_k.shape[:-1], block.linear("q").out_features)  # asked for, and not needed
            _, key, value = attention.prepare(y_q, y_k, y_v, position_embeddings=kind)
            self.update(key, value, index)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a compressed cache holds, by name, for `safetensors` or `torch.save`."""
        return {name: parts[0].contiguous() for name, parts in self.kept.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes what another cache of the same model held; `restore` makes keys and values of it."""
        self.kept = {name: [tensor] for name, tensor in state.items()}
        self.is_compressed = True

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As in `DynamicCache`. Raises ConfigError while it is compressed."""
        if self.is_compressed:
            raise ConfigError("the cache is compressed; call cache.restore() before the model goes on")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _linears(self) -> Iterator[tuple[str, Any]]:
        for index, block in enumerate(self.body.blocks):
            for name in READS[1:]:
                yield f"{index}.{name}", block.linear(name)


__all__ = ["LowRankCache"]
