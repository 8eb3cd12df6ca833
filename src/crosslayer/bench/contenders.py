"""The methods that benchmarks compare, at one shape: transformers' Llama, our models, and how each trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ..accounting.methods import current_method
from ..crnet import CRNetConfig, CRNetForCausalLM
from ..errors import ConfigError

REFERENCE = "llama"
"""transformers' own Llama: ratios are taken to it."""


@dataclass(frozen=True)
class Method:
    """One contender: a model, and what it keeps of its activations while training.

    Args:
        label: for people.
        model: "llama", or a `factorization` of CRNetConfig. Methods of one model share its weights.
        policy: memory policy of CR-Net.
        checkpointing: whether whole layers are checkpointed.
    """

    label: str
    model: str
    policy: str | None = None
    checkpointing: bool = False


METHODS = {
    "llama": Method("transformers Llama", "llama"),
    "dense": Method("dense", "dense"),
    "dense_checkpointing": Method("dense + checkpointing", "dense", checkpointing=True),
    "cola": Method("CoLA", "cola"),
    "plain_low_rank": Method("plain low rank", "low_rank"),
    "crnet": Method("CR-Net", "cross_layer", policy="none"),
    "crnet_invert": Method("CR-Net, invert", "cross_layer", policy="invert"),
    "crnet_replay": Method("CR-Net, replay", "cross_layer", policy="replay"),
    "crnet_reversible": Method("CR-Net, reversible", "cross_layer", policy="reversible"),
}
DEFAULT_METHODS = [name for name in METHODS if name != "plain_low_rank"]
DTYPES = ("float32", "bfloat16", "mixed")
"""Weights and products in one type, or float32 weights under bf16 autocast."""


class Contenders:
    """Models of one shape, made when first asked for and shared by the methods that train the same one.

    Args:
        shape: fields of LlamaConfig; `rank` counts for low-rank models only.
        methods: names of `METHODS`.
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
        methods = list(dict.fromkeys(current_method(name) for name in methods))
        unknown = [name for name in methods if name not in METHODS]
        if unknown or not methods:
            raise ConfigError(f"methods={', '.join(unknown) or 'none'}; choose from {', '.join(METHODS)}")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r}; choose from {', '.join(DTYPES)}")
        self.shape, self.methods, self.device, self.dtype = dict(shape), methods, device, dtype
        self.interval, self.attention = interval, attention
        self._models: dict[str, PreTrainedModel] = {}
        for name in methods:
            self._config(METHODS[name])

    def model(self, name: str) -> PreTrainedModel:
        """The model of a method in training mode, switched to that method."""
        method = METHODS[name]
        if method.model not in self._models:
            self._models[method.model] = self._build(method)
        model = self._models[method.model].train()
        if method.policy is not None:
            model.set_recompute(method.policy, self._interval(method))
        elif method.checkpointing != model.is_activation_checkpointing:
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

    def _interval(self, method: Method) -> int | None:
        return self.interval if method.policy not in (None, "none") else None

    def _config(self, method: Method) -> LlamaConfig:
        shape = {name: value for name, value in self.shape.items() if name != "rank" or method.model != "llama"}
        try:
            if method.model == "llama":
                return LlamaConfig(**shape)
            options = {"recompute": method.policy, "recompute_interval": self._interval(method)}
            own: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
            return CRNetConfig(**shape, **own | {"factorization": method.model})
        except (StrictDataclassError, ValueError, ZeroDivisionError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise ConfigError(f"{method.label}: {reason}") from error

    def _build(self, method: Method) -> PreTrainedModel:
        torch.manual_seed(0)
        model_class = LlamaForCausalLM if method.model == "llama" else CRNetForCausalLM
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        with torch.device(self.device):
            return model_class._from_config(self._config(method), attn_implementation=self.attention, dtype=dtype)


__all__ = ["DEFAULT_METHODS", "DTYPES", "METHODS", "REFERENCE", "Contenders", "Method"]
