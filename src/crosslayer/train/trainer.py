"""transformers' Trainer, told about broken runs, parameter groups and whole-split perplexity."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..analysis.health import HealthLog, cross_layer_linears
from ..errors import ConfigError, RunInterruptedError, RunStoppedError, TrainingError
from ..evaluate import measure_perplexity
from ..private import prepare_anew, set_last_rates
from .callbacks import OwnIntervals, ReleaseGradients
from .checkpoints import keep_best, last_complete_checkpoint, remove_old, write_manifest
from .gradient_release import optim_name
from .losses import NextTokenLoss, without_repeats
from .measures import Health, Throughput, beta_range
from .monitor import STATE, Monitor, StepMonitor
from .optimizers import GroupedOptimizer
from .parallel import is_split, local, reshard
from .parameter_groups import ParameterGroups
from .progress import LogLines, Progress
from .sampler import LengthGroups
from .sharded import ShardWriter, has_shards, load_optimizer, load_weights
from .stopping import StopEarly
from .stream import StreamTrainer

_OF_GROUPS = ("initial_lr", "weight_decay", "betas", "eps", "momentum")
"""Settings of parameter groups that a resumed run may change; the rate comes from the schedule."""


_WHOLE_AND_AT_HAND: dict[str, Any] = {
    "dataloader_drop_last": False,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": None,
    "dataloader_persistent_workers": False,
    "dataloader_multiprocessing_context": None,
}
"""Settings of an evaluation's loader: all rows of a split, read by the process itself."""


@contextmanager
def _settings(arguments: TrainingArguments, **settings: Any) -> Iterator[None]:
    """Other settings for a while."""
    before = {name: getattr(arguments, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(arguments, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(arguments, name, value)


class SafeTrainer(Trainer):
    """Trainer that stops a broken run: numbers that are not finite, a checkpoint that cannot be written.

    As a first base class it does the same for other Trainers.

    - `run`: as `train`, and may be asked to stop early;
    - `_get_grad_norm`: looks at loss and gradient norm of a step, and leaves out one that is not finite;
    - `log`: the loss is the mean over the steps since the last log, also where a run was resumed between two;
    - `train`: with several processes they train one model also after an evaluation;
    - `_save_checkpoint`: never keeps a half-written checkpoint or one with weights that are not finite; adds hashes;
    - a model that processes share is saved and gone on with in parts (sharded.py), which the Trainer cannot do;
    - `_get_train_sampler`: rows grouped by length come in an order that a resumed run finds again;
    - `get_batch_samples`: rows that accelerate repeats to give every process as many do not count a second time;
    - `_run_epoch`: a run that goes on from its last step takes no other;
    - `_load_optimizer_and_scheduler`: a resumed run takes its own rates, decay and schedule;
    - progress: a bar with the loss, or log lines, in place of printed dictionaries.
    """

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(self, *args, monitor: Monitor | None = None, **kwargs) -> None:
        # The Trainer refuses checkpoints to go on from of a model that processes share; it is not asked to write them.
        weights_only = kwargs["args"].save_only_model or is_split(kwargs.get("model"))
        with _settings(kwargs["args"], save_only_model=weights_only):
            super().__init__(*args, **kwargs)
        is_adapted = hasattr(self.model, "peft_config")  # whole in every process, and all that is saved
        self.shards = ShardWriter() if is_split(self.model) and not is_adapted else None
        settings = monitor or Monitor()
        self.monitor = StepMonitor(settings, self.last_good_checkpoint)
        self.stopping = StopEarly(settings.max_hours)
        self._step_loss = torch.zeros((), device=self.args.device)
        self._most_checkpoints: int | None = self.args.save_total_limit
        for callback in (self.monitor, self.stopping, OwnIntervals()):
            self.add_callback(callback)
        # The Trainer has one of the two; its own print dictionaries, one of them to standard output.
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(Progress())
        elif self.pop_callback(PrinterCallback) is not None:
            self.add_callback(LogLines())

    def run(self, checkpoint: Path | None) -> None:
        """Train from the first step or a checkpoint. Raises RunStoppedError and RunInterruptedError where it ends
        early, TrainingError where it is broken."""
        try:
            with self.stopping.listening():
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except KeyboardInterrupt:
            raise RunInterruptedError(
                f"interrupted at step {self.state.global_step}; {self.last_good_checkpoint()}"
            ) from None
        if self.stopping.is_stopping and self.state.global_step < self.state.max_steps:
            raise RunStoppedError(
                f"stopped at step {self.state.global_step} ({self.stopping.reason or 'asked in another process'}); "
                f"{self.last_good_checkpoint()}"
            )

    def train(self, *args, **kwargs) -> Any:
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            # An evaluation before the first step prepared the model without DistributedDataParallel. accelerate would
            # take it for wrapped, and every process would train alone, on its own rows.
            self.model_wrapped = self.model
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            prepare_anew(self.model)
        self._step_loss = torch.zeros((), device=self.args.device)
        # The Trainer would take any folder that begins like a checkpoint for one of its own to remove.
        self._most_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super().train(*args, **kwargs)
            self._wait_for_shards()
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
        name = optim_name(self.args)
        steps_in_backward = self.is_deepspeed_enabled or "lomo" in name or "layerwise" in name
        if steps_in_backward and self.monitor.settings.on_nonfinite == "skip":
            raise ConfigError(
                f"on_nonfinite=skip needs the gradients before the optimizer does, and "
                f"{'deepspeed' if self.is_deepspeed_enabled else f'optim={name}'} steps within the backward pass; "
                "choose on_nonfinite=stop, or another optimizer"
            )
        if self.is_fsdp_enabled or steps_in_backward:
            return  # they change the model, or need it wrapped
        self.create_optimizer_and_scheduler(num_training_steps=steps)
        self.optimizer, self.lr_scheduler = None, None

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = self._step_loss + loss
        return loss.nan_to_num(0.0, 0.0, 0.0)  # the Trainer's own sum is for `train_loss` alone

    def _get_grad_norm(self, model, grad_norm=None) -> Any:
        """The Trainer's last call before the optimizer's step. None for a step that is left out."""
        norm = super()._get_grad_norm(model, grad_norm)
        loss, wrong, value = self._step_of_all(norm)
        if not self.monitor.look(self.state.global_step + 1, loss, value, wrong):
            return norm
        model.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient: no decay, no momentum
        return None

    def _step_of_all(self, norm: Any) -> tuple[float, str | None, float]:
        """(loss of the step, what is not finite, gradient norm), the same in every process; the one place where the
        host waits for a device once a step. Notes too whether any process has been asked to stop."""
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2
        loss = self._step_loss.float()
        norm = torch.as_tensor(0.0 if norm is None else norm, device=loss.device).float()
        self._step_loss = torch.zeros_like(loss)
        # A scaler (fp16) looks for overflows itself and leaves such steps out.
        norm_is_wrong = ~norm.isfinite() if self.accelerator.scaler is None else torch.zeros_like(norm)
        asked = torch.full_like(loss, self.stopping.is_asked())
        found = torch.stack([loss, ~loss.isfinite(), norm_is_wrong, asked, norm])
        if self.args.world_size > 1:
            found = self.accelerator.reduce(found, reduction="mean")
        mean_loss, bad_loss, bad_norm, stop, value = found.tolist()
        self.stopping.is_stopping = stop > 0
        return mean_loss, "loss" if bad_loss else "gradient norm" if bad_norm else None, value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            del logs["loss"]
            logs.update(self.monitor.metrics())
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is not LengthGroupedSampler:
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroups(sampler.batch_size, sampler.lengths, seed)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        return super().get_batch_samples(map(self.without_repeats, epoch_iterator), num_batches, device)

    def without_repeats(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The last batch of a pass over the data with several processes: labels of repeated rows do not count."""
        data = self.accelerator.gradient_state
        if self.args.world_size == 1 or not data.end_of_dataloader or data.remainder < 1 or "labels" not in batch:
            return batch
        first_row = self.args.process_index // self.get_tp_size() * len(batch["labels"])
        return {**batch, "labels": without_repeats(batch["labels"], first_row, data.remainder)}

    def _save_checkpoint(self, model, trial) -> None:
        self._wait_for_shards()
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if not all(bool(local(parameter).isfinite().all()) for parameter in self.model.parameters()):
            raise TrainingError(f"weights are not finite at step {step}; {self.last_good_checkpoint()}")
        self.state.stateful_callbacks[STATE] = self.monitor.state()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise self._not_written(step, error) from error
        self.accelerator.wait_for_everyone()  # every process has written its random state
        best = self.state.best_model_checkpoint

        def finish() -> None:
            if self.args.should_save:
                write_manifest(folder, processes=self.args.world_size, weights_only=bool(self.args.save_only_model))
                # Older ones go when this one is whole, hashes and all; and only folders that are checkpoints.
                remove_old(folder.parent, folder, self._most_checkpoints, best)

        try:
            if self.shards is None or self.args.save_only_model:
                finish()
            else:
                self.shards.start(folder, self.model, self.own_optimizer(), finish)
        except OSError as error:
            raise self._not_written(step, error) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.shards is None or not _internal_call or self.args.save_only_model:
            super().save_model(output_dir, _internal_call=_internal_call)
        elif self.args.should_save:  # of a checkpoint whose weights are written in parts
            folder = Path(output_dir or self.args.output_dir)
            self.model.config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.shards is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            torch.save(cast(LambdaLR, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def own_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without what accelerate puts around it."""
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))

    def _wait_for_shards(self) -> None:
        if self.shards is None:
            return
        try:
            self.shards.wait()
        except Exception as error:  # torch hands on whatever a process met
            raise self._not_written(self.state.global_step, error) from error
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if has_shards(Path(resume_from_checkpoint)):
            load_weights(Path(resume_from_checkpoint), self.accelerator.unwrap_model(self.model))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if has_shards(best):
            self._wait_for_shards()
            load_weights(best, self.accelerator.unwrap_model(self.model))
        else:
            super()._load_best_model()

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
        if has_shards(Path(checkpoint)):
            load_optimizer(Path(checkpoint), self.accelerator.unwrap_model(self.model), self.own_optimizer())
            cast(LambdaLR, schedule).load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        else:
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


class PretrainTrainer(GroupedOptimizer, StreamTrainer, SafeTrainer):
    """SafeTrainer, for streams and groups of parameters too, with four differences, each in one method.

    - `evaluate`: token-weighted loss, perplexity and bits per byte over the whole split (`eval_loss` of the plain
      Trainer is a mean of batch means);
    - `get_eval_dataloader`: made once; the last, smaller batch too, whatever `dataloader_drop_last` says;
    - `log`: tokens/s, model FLOPs utilisation, the range of beta and the drift of rebuilt states beside the loss;
    - `training_step`: hands a sequence to what writes a CR-Net's health by layer and position into `health_file`.
    """

    def __init__(
        self,
        *args,
        parameter_groups: ParameterGroups,
        block_size: int,
        gradient_release: bool = False,
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
        self.evaluation_loader: tuple[Any, Any] | None = None  # (rows, their loader)
        self.throughput = Throughput(block_size)
        self.add_callback(self.throughput)
        if gradient_release:
            self.add_callback(ReleaseGradients(self))
        self.health = None
        if health_file is not None and cross_layer_linears(self.model):
            self.health = Health(
                HealthLog(health_file),
                self.accelerator.unwrap_model,
                self.compute_loss_context_manager,
                gradient_release,
            )
            self.add_callback(self.health)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.throughput.tokens += inputs["input_ids"].numel() * self.readers
        if self.health is not None:
            self.health.inputs = inputs
        return loss

    def get_eval_dataloader(self, eval_dataset=None):
        # One for all evaluations of a split, since accelerate keeps all that are made; of all of it, unlike steps. Its
        # rows are there: no workers, which would be forked for each evaluation, from a process with threads.
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.evaluation_loader is None or self.evaluation_loader[0] is not rows:
            with _settings(self.args, **_WHOLE_AND_AT_HAND):
                self.evaluation_loader = (rows, super().get_eval_dataloader(eval_dataset))
        return self.evaluation_loader[1]

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
                gather=self.gather_rows,
                on_batch=on_batch,
            )
        reshard(self.model)
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

    @property
    def readers(self) -> int:
        """How many processes read rows of their own."""
        return self.args.world_size // self.get_tp_size()

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes [B, 2], those that accelerate repeats left out; of tensor parallelism's, which read
        the same, once."""
        if self.get_tp_size() == 1:
            return self.accelerator.gather_for_metrics(rows)
        data = self.accelerator.gradient_state
        rows = self.accelerator.gather(rows).unflatten(0, (self.readers, self.get_tp_size(), -1))[:, 0].flatten(0, 1)
        return rows[: data.remainder] if data.end_of_dataloader and data.remainder > 0 else rows

    def _track_num_input_tokens(self, inputs) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # counts what a group of tensor parallelism reads for each of them
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.get_tp_size()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.throughput.metrics(self.model, self.args.device))
            logs.update(beta_range(self.model))
            drift = getattr(self.model, "recompute_drift", None)
            if drift is not None:
                logs["recompute_drift"] = drift
            if self.health is not None and self.health.largest is not None:
                logs["largest_increment"] = self.health.largest[0]
        super().log(logs)
        if "loss" in logs and self.health is not None and self.health.largest is not None:
            # Beside the numbers: trackers take no text.
            self.state.log_history[-1] |= {"largest_increment_at": self.health.largest[1]}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.write_card is not None and self.args.should_save:
            self.write_card(Path(output_dir or self.args.output_dir))
