"""transformers' Trainer, told about broken runs, parameter groups and whole-split perplexity."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..accounting import peak_flops, training_flops_per_token
from ..analysis.health import HealthLog, b_values, cross_layer_linears, gradient_norms, increment_ratios
from ..crnet import CRNetConfig
from ..errors import ConfigError, CrossLayerError, TrainingError
from ..evaluate import measure_perplexity
from ..private import prepare_anew, set_last_rates
from .callbacks import OwnIntervals, StopWhenNotFinite
from .checkpoints import keep_best, last_complete_checkpoint, remove_old, write_manifest
from .losses import NextTokenLoss, without_repeats
from .parameter_groups import ParameterGroups, divide_groups, optimizer_groups
from .progress import LogLines, Progress
from .stream import StreamTrainer


def training_arguments(kind: type[TrainingArguments], settings: dict[str, Any], output_dir: Path) -> TrainingArguments:
    """Arguments of a run, with `bf16: auto` decided. Raises ConfigError for values that cannot work."""
    settings = dict(settings)
    use_cuda = torch.cuda.is_available() and not settings.get("use_cpu", False)
    if settings.get("bf16") == "auto":
        settings["bf16"] = use_cuda and torch.cuda.is_bf16_supported()
    if not use_cuda:
        settings.setdefault("dataloader_pin_memory", False)
    try:
        arguments = kind(output_dir=str(output_dir), logging_nan_inf_filter=False, **settings)
        arguments.to_json_string()  # as a checkpoint and a tracker keep them
    except Exception as error:  # TrainingArguments and the libraries behind it fail in as many ways as there are values
        raise ConfigError(f"training: {' '.join(str(error).split()) or type(error).__name__}") from error
    _check_intervals(arguments)
    return arguments


def _check_intervals(arguments: TrainingArguments) -> None:
    if arguments.per_device_train_batch_size < 1 or arguments.gradient_accumulation_steps < 1:
        raise ConfigError(
            f"per_device_train_batch_size={arguments.per_device_train_batch_size} and gradient_accumulation_steps="
            f"{arguments.gradient_accumulation_steps} must be at least 1"
        )
    if arguments.save_strategy == "steps" and arguments.logging_strategy == "steps":
        save, log = arguments.save_steps, arguments.logging_steps
        if save >= 1 and log >= 1 and save % log != 0:
            raise ConfigError(
                f"save_steps={save:g} is not a multiple of logging_steps={log:g}; a run resumed between two logs would "
                "report a mean over fewer steps than an uninterrupted one"
            )


def check_metric(arguments: TrainingArguments, metrics: Sequence[str]) -> None:
    """Raises ConfigError where the best checkpoint is to be chosen by a number that no evaluation gives."""
    chosen = arguments.metric_for_best_model
    if chosen is not None and chosen.removeprefix("eval_") not in metrics:
        raise ConfigError(f"training.metric_for_best_model={chosen!r} is none of {', '.join(metrics)}")


@contextmanager
def nothing_left_behind(output_dir: Path) -> Iterator[None]:
    """For what is made before a run's folder is: turns what libraries refuse into ConfigError, and removes the empty
    folder that the Trainer makes."""
    existed = output_dir.exists()
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, AssertionError) as error:
        if not existed and output_dir.is_dir():
            with suppress(OSError):
                output_dir.rmdir()
        if isinstance(error, CrossLayerError):
            raise
        raise ConfigError(f"training: {' '.join(str(error).split()) or type(error).__name__}") from error


def describe_device(arguments: TrainingArguments) -> tuple[str, str, str]:
    """(device, why this one, precision) in words."""
    precision = "bf16 autocast" if arguments.bf16 else "fp16 autocast" if arguments.fp16 else "float32"
    if arguments.device.type == "cuda":
        return torch.cuda.get_device_name(arguments.device), "CUDA is available", precision
    reason = "use_cpu is set" if arguments.use_cpu else "CUDA is not available"
    return f"cpu, {torch.get_num_threads()} threads", reason, precision


_OF_GROUPS = ("initial_lr", "weight_decay", "betas", "eps", "momentum")
"""Settings of parameter groups that a resumed run may change; the rate comes from the schedule."""


class SafeTrainer(Trainer):
    """Trainer that stops a broken run: a loss that is not finite, a checkpoint that cannot be written.

    As a first base class it does the same for other Trainers.

    - `train`: with several processes they train one model also after an evaluation;
    - `_save_checkpoint`: never keeps a half-written checkpoint or one with weights that are not finite; adds hashes;
    - `get_batch_samples`: rows that accelerate repeats to give every process as many do not count a second time;
    - `_run_epoch`: a run that goes on from its last step takes no other;
    - `_load_optimizer_and_scheduler`: a resumed run takes its own rates, decay and schedule;
    - progress: a bar with the loss, or log lines, in place of printed dictionaries.
    """

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.losses_are_finite: torch.Tensor | bool = True
        self._most_checkpoints: int | None = self.args.save_total_limit
        self.add_callback(StopWhenNotFinite(self))
        self.add_callback(OwnIntervals())
        # The Trainer has one of the two; its own print dictionaries, one of them to standard output.
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(Progress())
        elif self.pop_callback(PrinterCallback) is not None:
            self.add_callback(LogLines())

    def train(self, *args, **kwargs) -> Any:
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            # An evaluation before the first step prepared the model without DistributedDataParallel. accelerate would
            # take it for wrapped, and every process would train alone, on its own rows.
            self.model_wrapped = self.model
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            prepare_anew(self.model)
        # The Trainer would take any folder that begins like a checkpoint for one of its own to remove.
        self._most_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.args.save_total_limit = self._most_checkpoints
        best = self.state.best_model_checkpoint
        if self._most_checkpoints == 1 and best is not None and self.args.should_save:
            keep_best(Path(self.args.output_dir), best, self.state.global_step)
        return output

    def _run_epoch(self, **settings) -> None:
        if self.state.global_step >= self.state.max_steps:  # the Trainer would take one step before it looks
            self.control.should_training_stop = True
            return
        super()._run_epoch(**settings)

    def check_optimizer(self, steps: int) -> None:
        """Make optimizer and schedule once and drop them: what they refuse shows before anything is written."""
        name = str(self.args.optim)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or "lomo" in name or "layerwise" in name:
            return  # they change the model, or need it wrapped
        self.create_optimizer_and_scheduler(num_training_steps=steps)
        self.optimizer, self.lr_scheduler = None, None

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses_are_finite = self.losses_are_finite & torch.isfinite(loss)
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        return super().get_batch_samples(map(self.without_repeats, epoch_iterator), num_batches, device)

    def without_repeats(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The last batch of a pass over the data with several processes: labels of repeated rows do not count."""
        data = self.accelerator.gradient_state
        if self.args.world_size == 1 or not data.end_of_dataloader or data.remainder < 1 or "labels" not in batch:
            return batch
        first_row = self.args.process_index * len(batch["labels"])
        return {**batch, "labels": without_repeats(batch["labels"], first_row, data.remainder)}

    def _save_checkpoint(self, model, trial) -> None:
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise TrainingError(f"weights are not finite at step {step}; {self.last_good_checkpoint()}")
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise self._not_written(step, error) from error
        self.accelerator.wait_for_everyone()  # every process has written its random state
        try:
            if self.args.should_save:
                write_manifest(folder, processes=self.args.world_size, weights_only=bool(self.args.save_only_model))
                # Older ones go when this one is whole, hashes and all; and only folders that are checkpoints.
                remove_old(folder.parent, folder, self._most_checkpoints, self.state.best_model_checkpoint)
        except OSError as error:
            raise self._not_written(step, error) from error

    def _not_written(self, step: int, error: Exception) -> TrainingError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return TrainingError(
            f"checkpoint of step {step} could not be written ({reason}); {self.last_good_checkpoint()}"
        )

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer, schedule = cast(torch.optim.Optimizer, self.optimizer), self.lr_scheduler
        asked = [{name: group[name] for name in _OF_GROUPS if name in group} for group in optimizer.param_groups]
        rates = list(getattr(schedule, "base_lrs", []))
        super()._load_optimizer_and_scheduler(checkpoint)
        # Both bring back the rates of the run that wrote them; this run has its own.
        for group, settings in zip(optimizer.param_groups, asked, strict=True):
            group.update(settings)
        if isinstance(schedule, LambdaLR):
            schedule.base_lrs = rates
            now = [rate * factor(schedule.last_epoch) for rate, factor in zip(rates, schedule.lr_lambdas, strict=True)]
            set_last_rates(schedule, now)
            for group, rate in zip(optimizer.param_groups, now, strict=True):
                group["lr"] = rate
        return None

    def last_good_checkpoint(self) -> str:
        """Words for an error message: where the run can go on from."""
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        if checkpoint is None:
            return "there is no earlier checkpoint"
        return f"the last good checkpoint is {checkpoint} (go on from it with --resume)"


class PretrainTrainer(StreamTrainer, SafeTrainer):
    """SafeTrainer, for streams too, with five differences, each in one method.

    - `create_optimizer`: learning-rate factors and weight decay by kind of parameter;
    - `evaluate`: token-weighted loss, perplexity and bits per byte over the whole split (`eval_loss` of the plain
      Trainer is a mean of batch means);
    - `get_eval_dataloader`: the last, smaller batch too, whatever `dataloader_drop_last` says;
    - `log`: tokens/s, model FLOPs utilisation, the range of beta and the drift of rebuilt states beside the loss;
    - `training_step`: hands a sequence to what writes a CR-Net's health by layer and position into `health_file`.
    """

    def __init__(
        self,
        *args,
        parameter_groups: ParameterGroups,
        block_size: int,
        validation_bytes: int | None = None,
        write_card: Callable[[Path], None] | None = None,
        health_file: Path | None = None,
        **kwargs,
    ) -> None:
        smoothing = kwargs["args"].label_smoothing_factor
        if smoothing:  # the Trainer's own way knows only transformers' model classes, and shifts no labels for others
            kwargs["compute_loss_func"] = NextTokenLoss(smoothing)
        super().__init__(*args, **kwargs)
        self.parameter_groups = parameter_groups
        self.validation_bytes = validation_bytes
        self.write_card = write_card
        self.last_evaluation: dict[str, Any] | None = None
        self.throughput = _Throughput(block_size)
        self.add_callback(self.throughput)
        self.health = None
        if health_file is not None and cross_layer_linears(self.model):
            self.health = _Health(
                HealthLog(health_file), self.accelerator.unwrap_model, self.compute_loss_context_manager
            )
            self.add_callback(self.health)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            if {"model", "optimizer_dict"} & settings.keys():  # steps parameter by parameter (LOMO, layer-wise GaLore)
                return super().create_optimizer(model)
            groups = optimizer_groups(model, self.parameter_groups, self.args.learning_rate, self.args.weight_decay)
            if "params" in settings:  # GaLore, APOLLO
                groups = divide_groups(settings.pop("params"), groups)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.throughput.tokens += inputs["input_ids"].numel() * self.args.world_size
        if self.health is not None:
            self.health.inputs = inputs
        return loss

    def get_eval_dataloader(self, eval_dataset=None):
        # `dataloader_drop_last` is for training steps of equal size; evaluation reads the whole split.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        started = time.perf_counter()
        dataloader = self.get_eval_dataloader(eval_dataset)

        def on_batch() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        self.callback_handler.eval_dataloader = dataloader
        with self.compute_loss_context_manager():
            result = measure_perplexity(
                self.model,
                dataloader,
                utf8_bytes=self.validation_bytes if eval_dataset is None else None,
                gather=self.accelerator.gather_for_metrics,
                on_batch=on_batch,
            )
        metrics = {
            f"{metric_key_prefix}_loss": result.loss,
            f"{metric_key_prefix}_perplexity": result.perplexity,
            f"{metric_key_prefix}_runtime": round(time.perf_counter() - started, 4),
        }
        if result.bits_per_byte is not None:
            metrics[f"{metric_key_prefix}_bits_per_byte"] = result.bits_per_byte
        self.log(metrics)
        self.last_evaluation = {**metrics, **result.to_dict()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.throughput.metrics(self.model, self.args.device))
            logs.update(beta_range(self.model))
            drift = getattr(self.model, "recompute_drift", None)
            if drift is not None:
                logs["recompute_drift"] = drift
        super().log(logs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.write_card is not None and self.args.should_save:
            self.write_card(Path(output_dir or self.args.output_dir))


def beta_range(model: torch.nn.Module) -> dict[str, float]:
    """Smallest and largest beta of a CR-Net model; nothing for other models."""
    betas = [p.detach().reshape(()) for name, p in model.named_parameters() if name.rpartition(".")[2] == "beta"]
    if not betas:
        return {}
    values = torch.stack(betas)
    return {"beta_min": values.min().item(), "beta_max": values.max().item()}


class _Throughput(TrainerCallback):
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


class _Health(TrainerCallback):
    """health.jsonl (analysis/health.py): one line at every logging step, nothing at the others.

    Gradients are read before the optimizer takes them, that is after clipping.
    """

    def __init__(self, log: HealthLog, unwrap: Callable, autocast: Callable) -> None:
        self.log = log
        self.unwrap = unwrap
        self.autocast = autocast
        self.inputs: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, list[float | None]] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.log.cut(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if _will_log(args, state):
            self.gradients = gradient_norms(model)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if not self.gradients:
            return
        model = self.unwrap(model)
        sequence: dict[str, torch.Tensor] = {
            name: self.inputs[name][:1].to(args.device) for name in ("input_ids", "position_ids") if name in self.inputs
        }
        with self.autocast():
            ratios = increment_ratios(model, sequence)
        record = {
            "step": state.global_step,
            "tokens": int(state.num_input_tokens_seen),
            "b": b_values(model),
            "increment_ratio": ratios,
            "gradient_norm": self.gradients,
        }
        self.gradients, self.inputs = {}, {}
        if state.is_world_process_zero:
            self.log.append(record)


def _will_log(args, state) -> bool:
    """Whether the step under way, not counted yet, is one that the Trainer logs after."""
    step = state.global_step + 1
    if args.logging_strategy != "steps":
        return False
    return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
