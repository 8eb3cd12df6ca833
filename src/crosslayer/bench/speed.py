"""Tokens per second of training, prefill and decode, measured so that contenders can be compared.

Contenders take turns: a change of the machine's speed meets all of them. A figure is the median of
the turns after a warm-up, with the 20th and 80th percentile beside it. On CUDA, events around each turn.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, StaticCache

from ..accounting import peak_flops
from ..analysis import measure_peak_memory
from ..private import attention_operations, fused_attention_on_cpu
from ..workers import initialize_worker, without_interrupts
from .contenders import REFERENCE, SETUPS, ChunkedLoss, Contenders
from .rows import GenerationRow, PeakRow, RelativeTiming, Timing, TrainingRow

Step = Callable[[], Any]


def take_turns(
    steps: dict[str, Step],
    turns: int,
    *,
    warm_up: int = 2,
    device: str = "cpu",
    before: Callable[[str], Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every counted turn of each step; `before(name)` runs ahead of its turn, outside the clock."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warm_up + turns):
        for name, step in steps.items():
            if before is not None:
                before(name)
            taken = _seconds_of(step, device)
            if turn >= warm_up:
                seconds[name].append(taken)
    return seconds


def _seconds_of(step: Step, device: str) -> float:
    if torch.device(device).type != "cuda":
        started = time.perf_counter()
        step()
        return time.perf_counter() - started
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def summarize(seconds: list[float], tokens: int) -> Timing:
    """Tokens/s by the median, the spread (20th and 80th percentile of the seconds), and every turn."""
    median = statistics.median(seconds)
    quantiles = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else [median] * 4
    return {
        "tokens_per_s": round(tokens / median, 1),
        "step_s": {
            "median": _rounded(median),
            "p20": _rounded(quantiles[0]),
            "p80": _rounded(quantiles[-1]),
            "turns": [_rounded(turn) for turn in seconds],
        },
    }


def training_step(
    model: PreTrainedModel,
    ids: torch.Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> Step:
    """Forward, loss by vocabulary chunks (`ChunkedLoss`), backward and optimizer; None: fused AdamW."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    trained = ChunkedLoss(model)

    def step() -> None:
        with precision():
            loss = trained(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class OwnProcess:
    """A training step of one method in a process of its own, as a step that can be called here.

    Contenders in one process share a heap: what the one before has freed decides how many pages a step must ask the
    system for, so that who follows whom changes the ratios. In training a model has the process to itself.

    Args:
        contenders: what is to be trained; its models are made anew over there.
        name: one of its methods.
        ids: [batch, tokens] of every step.

    Raises:
        RuntimeError: when asked for anything, if the process failed; its own traceback is on stderr.
    """

    def __init__(self, contenders: Contenders, name: str, ids: torch.Tensor) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, contenders.without_models(), name, ids.cpu(), torch.get_num_threads())
        self.process = context.Process(target=_serve_steps, args=arguments, daemon=True)
        with without_interrupts():
            self.process.start()
        theirs.close()
        self.name = name

    def wait_until_ready(self) -> None:
        """Until the model is there."""
        self._ask("whether it is ready")

    def __call__(self) -> None:
        """One training step, waited for."""
        self._ask("step")

    def _ask(self, what: str) -> None:
        try:
            self.connection.send(what)
            self.connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"The process that trains {self.name} has ended; its traceback is above.") from None

    def close(self) -> None:
        """Ends the process."""
        self.connection.close()
        self.process.join()


def _serve_steps(connection: Connection, contenders: Contenders, name: str, ids: torch.Tensor, threads: int) -> None:
    initialize_worker()
    torch.set_num_threads(threads)
    step = training_step(contenders.model(name), ids.to(contenders.device), precision=contenders.precision)
    with suppress(EOFError, BrokenPipeError):
        while True:
            if connection.recv() == "step":
                step()
            connection.send("done")


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *args, out_shape=None, **kwargs) -> int:
    return attention_operations(query, key, value)


def matrix_operations(model: nn.Module, ids: torch.Tensor) -> int:
    """Operations of a training step by torch's counter: backward twice the forward, recomputation not counted.

    Attention counts as the full square, as on CUDA; torch's counter does not know the CPU's fused kernel by itself, nor
    what is within a chunked loss: the logits of one sequence are made here, and counted for all.
    """
    known = {fused_attention_on_cpu()[0]: _attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        model(input_ids=ids[:1], use_cache=False)
    return 3 * len(ids) * counter.get_total_flops()


def training_rows(
    seconds: dict[str, list[float]],
    operations: dict[str, int],
    parameters: dict[str, int],
    tokens: int,
    reference: str,
) -> dict[str, TrainingRow]:
    """One row for each contender, as ratios to `reference`."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {
            **summarize(times, tokens),
            "speed_over_llama": round(medians[reference] / medians[name], 3),
            "matrix_operations": operations[name],
            "speed_if_operations_decided": round(operations[reference] / operations[name], 3),
            "parameters": parameters[name],
        }
        for name, times in seconds.items()
    }


def measure_training(
    contenders: Contenders, ids: torch.Tensor, *, turns: int = 12, warm_up: int = 2, own_processes: int = 0
) -> dict[str, TrainingRow]:
    """Training speed of every method: {method: row of `training_rows`, with "mfu" on devices whose peak is known}.

    In one process, methods of one model share its weights and its optimizer. With `own_processes` each method has an
    `OwnProcess`, and all of them start anew so many times, each time for `turns` of its own: where the memory of a
    process lies is luck that would last as long as the process. A turn is two steps there, the second one counted: in
    training a step follows a step, not a pause. For the CPU: processes of one GPU would share its memory.
    """
    steps: dict[str, Step] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders.methods}
    operations, parameters = {}, {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name in contenders.methods:
        model = contenders.model(name)
        operations[name] = matrix_operations(model, ids)
        parameters[name] = sum(parameter.numel() for parameter in model.parameters())
        if not own_processes:
            kind = SETUPS[name].model
            if kind not in optimizers:
                optimizers[kind] = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            steps[name] = training_step(model, ids, optimizers[kind], contenders.precision)
    clock = partial(take_turns, turns=turns, warm_up=warm_up, device=contenders.device)
    if own_processes:
        contenders.drop()
    else:
        seconds = clock(steps, before=contenders.model)
    for _ in range(own_processes):
        for name, taken in _in_own_processes(contenders, ids, clock).items():
            seconds[name] += taken
    reference = REFERENCE if REFERENCE in seconds else next(iter(seconds))
    rows = training_rows(seconds, operations, parameters, ids.numel(), reference)
    peak = peak_flops(torch.cuda.get_device_name(ids.device)) if ids.is_cuda else None
    if peak is not None:
        for row in rows.values():
            row["mfu"] = round(row["matrix_operations"] / row["step_s"]["median"] / peak, 4)
    return rows


def _in_own_processes(contenders: Contenders, ids: torch.Tensor, clock: Callable) -> dict[str, list[float]]:
    with ExitStack() as stack:
        started = ((name, OwnProcess(contenders, name, ids)) for name in contenders.methods)
        processes = {name: stack.enter_context(closing(process)) for name, process in started}
        for process in processes.values():
            process.wait_until_ready()
        return clock(dict(processes), before=lambda name: processes[name]())


def measure_generation(
    contenders: Contenders,
    *,
    batch: int = 1,
    prompt: int = 128,
    new_tokens: int = 64,
    turns: int = 8,
    warm_up: int = 2,
    backend: str | None = None,
) -> dict[str, GenerationRow]:
    """Prefill of a prompt [batch, prompt] and greedy decode after it: {method: {"prefill": row, "decode": row}}.

    Decode runs one forward for each token of the batch, with transformers' DynamicCache and argmax; a turn is
    `new_tokens` of them. How a model trains makes no difference here: one method for each model is measured. With a
    `backend` of torch.compile the cache is a StaticCache and the forward of a token is compiled, with "inductor" into
    CUDA graphs; prefill is not.
    """
    ids = contenders.tokens(batch, prompt)
    make = _Generation if backend is None else partial(_StaticGeneration, backend=backend)
    runs = {name: make(contenders, name, ids, new_tokens) for name in _one_for_each_model(contenders.methods)}
    clock = partial(take_turns, turns=turns, warm_up=warm_up, device=contenders.device)
    with torch.no_grad():  # not inference_mode: a compiled step could not write into the cache
        prefill = clock({name: run.prefill for name, run in runs.items()})
        decode = clock({name: run.decode for name, run in runs.items()}, before=lambda name: runs[name].prefill())
    reference = REFERENCE if REFERENCE in runs else next(iter(runs))

    def row(seconds: dict[str, list[float]], name: str, tokens: int) -> RelativeTiming:
        ratio = statistics.median(seconds[reference]) / statistics.median(seconds[name])
        return {**summarize(seconds[name], batch * tokens), "speed_over_llama": round(ratio, 3)}

    return {
        name: {
            "weight_bytes": _weight_bytes(contenders.model(name)),
            "prefill": row(prefill, name, prompt),
            "decode": row(decode, name, new_tokens),
        }
        for name in runs
    }


def measure_memory(contenders: Contenders, ids: torch.Tensor) -> dict[str, PeakRow]:
    """Peak memory of a training step by part: {method: bytes}, in one step of AdamW, the loss by vocabulary chunks."""
    rows: dict[str, PeakRow] = {}
    for name in contenders.methods:
        model = ChunkedLoss(contenders.model(name))
        with contenders.precision():
            rows[name] = cast(PeakRow, measure_peak_memory(model, ids).to_dict())
    return rows


def _one_for_each_model(methods: Iterable[str]) -> list[str]:
    first: dict[str, str] = {}
    for name in methods:
        first.setdefault(SETUPS[name].model, name)
    return list(first.values())


class _Generation:
    """One prompt through one model: `prefill` fills a new cache, `decode` goes on from there."""

    def __init__(self, contenders: Contenders, name: str, ids: torch.Tensor, new_tokens: int) -> None:
        self.model, self.precision = contenders.model(name).eval(), contenders.precision
        self.ids, self.new_tokens = ids, new_tokens

    def prefill(self) -> None:
        with self.precision():
            output = self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        self.cache, self.next = output.past_key_values, output.logits.argmax(-1)

    def decode(self) -> None:
        with self.precision():
            for _ in range(self.new_tokens):
                output = self.model(input_ids=self.next, past_key_values=self.cache, use_cache=True)
                self.next = output.logits.argmax(-1)


class _StaticGeneration(_Generation):
    """The same with a StaticCache, and a compiled forward for each token."""

    def __init__(self, contenders: Contenders, name: str, ids: torch.Tensor, new_tokens: int, backend: str) -> None:
        super().__init__(contenders, name, ids, new_tokens)
        self.cache = StaticCache(config=self.model.config, max_cache_len=ids.shape[1] + new_tokens)
        mode = "reduce-overhead" if backend == "inductor" else None
        self.step = torch.compile(self.model, fullgraph=True, dynamic=False, backend=backend, mode=mode)

    def prefill(self) -> None:
        self.cache.reset()
        with self.precision():
            output = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.next = output.logits.argmax(-1)
        self.position = torch.full((1, 1), self.ids.shape[1], device=self.ids.device)

    def decode(self) -> None:
        with self.precision():
            for _ in range(self.new_tokens):
                torch.compiler.cudagraph_mark_step_begin()  # what the step before gave is no longer needed
                given = {"position_ids": self.position, "past_key_values": self.cache, "use_cache": True}
                self.next = self.step(input_ids=self.next, **given).logits.argmax(-1)
                self.position = self.position + 1


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decoded token reads: all but the embeddings, unless they are the head too."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    read = [p for p in model.parameters() if tied or p is not model.get_input_embeddings().weight]
    return sum(parameter.numel() * parameter.element_size() for parameter in read)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


__all__ = [
    "OwnProcess",
    "matrix_operations",
    "measure_generation",
    "measure_memory",
    "measure_training",
    "summarize",
    "take_turns",
    "training_rows",
    "training_step",
]
