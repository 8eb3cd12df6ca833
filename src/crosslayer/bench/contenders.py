"""The methods that benchmarks compare, at one shape: transformers' Llama, our models, and how each trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ..crnet import CRNetConfig, CRNetForCausalLM
from ..crnet.loss import fused_cross_entropy
from ..errors import ConfigError
from ..methods import METHODS, check_method
from ..private import model_from_config

REFERENCE = "llama"
"""transformers' own Llama: ratios are taken to it."""


@dataclass(frozen=True)
class Setup:
    """One contender: a model, and what it keeps of its activations while training.

    Args:
        model: "llama", or a `factorization` of CRNetConfig. Methods of one model share its weights.
        policy: memory policy of CR-Net or CoLA.
        checkpointing: whether whole layers are checkpointed.
    """

    model: str
    policy: str | None = None
    checkpointing: bool = False


SETUPS = {
    "llama": Setup("llama"),
    "dense": Setup("dense"),
    "dense_checkpointing": Setup("dense", checkpointing=True),
    "cola": Setup("cola", policy="none"),
    "cola_checkpointing": Setup("cola", policy="none", checkpointing=True),
    "cola_invert": Setup("cola", policy="invert"),
    "low_rank": Setup("low_rank"),
    "crnet": Setup("cross_layer", policy="none"),
    "crnet_invert": Setup("cross_layer", policy="invert"),
    "crnet_replay": Setup("cross_layer", policy="replay"),
    "crnet_reversible": Setup("cross_layer", policy="reversible"),
}
"""Method (crosslayer/methods.py) -> its setup."""

DEFAULT_METHODS = [name for name in SETUPS if name not in ("cola_checkpointing", "cola_invert", "low_rank")]
DTYPES = ("float32", "bfloat16", "mixed")
"""Weights and products in one type, or float32 weights under bf16 autocast."""


LOSS = "by vocabulary chunks"
"""How every contender takes its loss, as result files say."""


class ChunkedLoss(nn.Module):
    """A contender as it trains, transformers' Llama too: the loss by vocabulary chunks (crnet/loss.py), no logits.

    Args:
        model: a causal language model of Llama's parts, `model` and `lm_head`; it is not changed.
    """

    base_model_prefix = "model"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **arguments: Any) -> CausalLMOutput:
        """input_ids, labels [B, T] -> `loss`, a float32 number; no logits."""
        hidden_states = self.model(input_ids=input_ids, **arguments).last_hidden_state
        return CausalLMOutput(loss=fused_cross_entropy(hidden_states, self.lm_head, labels))


class Contenders:
    """Models of one shape, made when first asked for and shared by the methods that train the same one.

    Args:
        shape: fields of LlamaConfig; `rank` counts for low-rank models only.
        methods: names of `SETUPS`.
        device: where the models live.
        dtype: one of `DTYPES`.
        interval: `recompute_interval` of the policies that rebuild states.
        attention: attention implementation of transformers.

    Raises:
        ConfigError: an unknown method or dtype, or a shape that a model refuses.
    """

    def __init__(
        self,
        shape: dict[str, Any],
        methods: list[str],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        interval: int | None = None,
        attention: str = "sdpa",
    ) -> None:
        methods = list(dict.fromkeys(check_method(name, SETUPS) for name in methods))
        if not methods:
            raise ConfigError(f"methods is empty; choose from {', '.join(SETUPS)}")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r}; choose from {', '.join(DTYPES)}")
        self.shape, self.methods, self.device, self.dtype = dict(shape), methods, device, dtype
        self.interval, self.attention = interval, attention
        self._models: dict[str, PreTrainedModel] = {}
        for name in methods:
            self._config(name)

    def model(self, name: str) -> PreTrainedModel:
        """The model of a method in training mode, switched to that method."""
        method = SETUPS[name]
        if method.model not in self._models:
            self._models[method.model] = self._build(name)
        model = self._models[method.model].train()
        if method.policy is not None:
            model.set_recompute(method.policy, self._interval(method))
        if method.checkpointing != model.is_activation_checkpointing:
            switch = "enable" if method.checkpointing else "disable"
            getattr(model, f"activation_checkpointing_{switch}")()
        return model

    def drop(self) -> None:
        """Lets go of all models."""
        self._models.clear()

    def without_models(self) -> "Contenders":
        """The same, none of them made."""
        found = copy(self)
        found._models = {}
        return found

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast where the dtype is "mixed"."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "mixed"):
            yield

    def tokens(self, batch: int, sequence: int) -> torch.Tensor:
        """Random ids [batch, sequence], the same every time."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.shape["vocab_size"], (batch, sequence), generator=generator).to(self.device)

    def _interval(self, method: Setup) -> int | None:
        return self.interval if method.policy not in (None, "none") else None

    def _config(self, name: str) -> LlamaConfig:
        method = SETUPS[name]
        shape = {field: value for field, value in self.shape.items() if field != "rank" or method.model != "llama"}
        try:
            if method.model == "llama":
                return LlamaConfig(**shape)
            options = {"recompute": method.policy, "recompute_interval": self._interval(method)}
            own: dict[str, Any] = {field: value for field, value in options.items() if value is not None}
            return CRNetConfig(**shape, **own | {"factorization": method.model})
        except (StrictDataclassError, ValueError, ZeroDivisionError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise ConfigError(f"{METHODS[name]}: {reason}") from error

    def _build(self, name: str) -> PreTrainedModel:
        torch.manual_seed(0)
        model_class = LlamaForCausalLM if SETUPS[name].model == "llama" else CRNetForCausalLM
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        with torch.device(self.device):
            return model_from_config(model_class, self._config(name), attn_implementation=self.attention, dtype=dtype)


__all__ = ["DEFAULT_METHODS", "DTYPES", "LOSS", "REFERENCE", "SETUPS", "ChunkedLoss", "Contenders", "Setup"]
