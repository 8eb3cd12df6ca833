"""What the log says of a run under way: speed, beta, and a CR-Net's health by layer and position."""

import time
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import TrainerCallback

from ..accounting import peak_flops, training_flops_per_token
from ..analysis.health import HealthLog, b_values, gradient_norms, increment_ratios, largest_increment
from ..crnet import CRNetConfig
from .parallel import reshard, whole


def beta_range(model: torch.nn.Module) -> dict[str, float]:
    """Smallest and largest beta of a CR-Net model; nothing for other models."""
    betas = [whole(p.detach()).reshape(()) for name, p in model.named_parameters() if name.rpartition(".")[2] == "beta"]
    if not betas:
        return {}
    values = torch.stack(betas)
    return {"beta_min": values.min().item(), "beta_max": values.max().item()}


class Throughput(TrainerCallback):
    """Tokens per second of training alone, without evaluation and saving, since the last log."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tokens = 0  # since the last log
        self.seconds = 0.0
        self.total_tokens = 0  # of this process, without the first step, which warms up
        self.total_seconds = 0.0
        self._step_started = 0.0
        self._is_first_step = True

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._step_started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._is_first_step:
            self._is_first_step, self.tokens = False, 0
            return
        self.seconds += time.perf_counter() - self._step_started

    def metrics(self, model: torch.nn.Module, device: torch.device) -> dict[str, Any]:
        """tokens_per_s of all processes since the last call, and mfu where the device's peak is known."""
        if not self.seconds:
            return {}
        tokens_per_s = self.tokens / self.seconds
        self.total_tokens, self.total_seconds = self.total_tokens + self.tokens, self.total_seconds + self.seconds
        self.tokens, self.seconds = 0, 0.0
        metrics = {"tokens_per_s": round(tokens_per_s, 1)}
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if peak is not None:
            world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            flops = training_flops_per_token(cast(CRNetConfig, model.config), self.block_size)
            metrics["mfu"] = round(tokens_per_s * flops / peak / world, 4)
        return metrics


class Health(TrainerCallback):
    """health.jsonl (analysis/health.py): one line at every logging step, nothing at the others.

    Gradients are read before the optimizer takes them, that is after clipping.
    """

    def __init__(self, log: HealthLog, unwrap: Callable, autocast: Callable, released: bool) -> None:
        self.log = log
        self.released = released  # gradients are gone by then
        self.unwrap = unwrap
        self.autocast = autocast
        self.inputs: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, list[float | None]] = {}
        self.largest: tuple[float, str] | None = None  # increment ratio, and where

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.log.cut(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if _will_log(args, state):
            self.gradients = gradient_norms(model)
            if self.released:
                self.gradients = {name: [None] * len(norms) for name, norms in self.gradients.items()}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if not self.gradients:
            return
        model = self.unwrap(model)
        sequence: dict[str, torch.Tensor] = {
            name: self.inputs[name][:1].to(args.device) for name in ("input_ids", "position_ids") if name in self.inputs
        }
        with self.autocast():
            ratios = increment_ratios(model, sequence)
        reshard(model)
        record = {
            "step": state.global_step,
            "tokens": int(state.num_input_tokens_seen),
            "b": b_values(model),
            "increment_ratio": ratios,
            "gradient_norm": self.gradients,
        }
        self.gradients, self.inputs = {}, {}
        self.largest = largest_increment(ratios)
        if state.is_world_process_zero:
            self.log.append(record)


def _will_log(args, state) -> bool:
    """Whether the step under way, not counted yet, is one that the Trainer logs after."""
    step = state.global_step + 1
    if args.logging_strategy != "steps":
        return False
    return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
