"""The low-rank residual around a block: h_out = Block(h_in) + (alpha / r) B(A(dropout(h_in))), arXiv 2503.00572.

    h_in --+--> block --------(+)--> h_out          The layer is a child of its block, and hooks on the block, outside
           |                   |                    whatever the block's forward is wrapped in (gradient checkpointing,
           +--> dropout, A, B -+                    CR-Net's tape), add the residual. The block itself stays as it is,
                                                    so names, LoRA on its linears and recorded hidden states do too.

A fused module spans several blocks: the first one hands its input on, the owner of the weights computes the residual
while its own block runs, the last one adds it. An injected block has low-rank pairs on some of its linears instead.
Which of these a block is stands in an integer buffer, so that it is saved and loaded with the weights:

    lor2c_state = [blocks before it that its module covers, blocks after it, has a module, is injected]
"""

import threading
from itertools import count
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import CheckpointError, ConfigError
from ..private import is_replica
from .structure import Span

MERGE_REASON = (
    "LoR2C cannot be merged: its residual goes around whole blocks, past their norms and non-linearities, so no weight "
    "of the base model can hold it. Keep the adapter beside the model, or call unload() to drop it."
)


class _HandedOn(threading.local):
    """Tensors on their way through fused modules; one per thread, as torch.nn.DataParallel has a replica in each."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[int, str], torch.Tensor] = {}


_handed_on = _HandedOn()
_numbers = count()


class LoR2CLayer(nn.Module, BaseTunerLayer):
    """The adapters of one block, by adapter name.

    Args:
        block: the block; not registered here, since this layer is the block's child.
        name: the block's name in the model, for messages.
        width: d of the residual stream.
    """

    adapter_layer_names = ("lor2c_A", "lor2c_B", "lor2c_inject_A", "lor2c_inject_B")
    other_param_names = ("lor2c_dropout", "lor2c_state", "r", "scaling", "reads", "inject_r", "inject_scaling", "spans")

    def __init__(self, block: nn.Module, name: str, width: int) -> None:
        super().__init__()
        self.name = name
        self.in_features = self.out_features = width
        self.lor2c_A = nn.ModuleDict()
        self.lor2c_B = nn.ModuleDict()
        self.lor2c_dropout = nn.ModuleDict()
        self.lor2c_inject_A = nn.ModuleDict()  # adapter -> {linear: A}
        self.lor2c_inject_B = nn.ModuleDict()
        self.lor2c_state = BufferDict(persistent=True)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.reads: dict[str, str] = {}  # what A reads: the block's "input" or, without the path around it, "output"
        self.inject_r: dict[str, int] = {}
        self.inject_scaling: dict[str, float] = {}

        self.number = 0  # the block's place in its list
        self.stack = Stack({0: self})  # the layers of that list, this one among them; the tuner says which
        self.spans: dict[str, Span | None] = {}  # the state, read: the module that covers this block
        self.rows: dict[str, torch.Tensor] | None = None  # mixed batch: adapter -> rows of the batch
        self._read: dict[str, torch.Tensor] = {}  # the buffers that `spans` was read from
        self._block = [block]
        self._handles: list[RemovableHandle] = [
            block.register_forward_pre_hook(_before_block),
            block.register_forward_hook(_after_block, with_kwargs=True, prepend=True),
        ]
        self._inject_handles: list[RemovableHandle] = []
        self.register_load_state_dict_post_hook(_forget_structure)

    # Making adapters

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        scaling: float,
        dropout: float,
        init_weights: bool,
        shared_A: nn.Module | None = None,
        reads: str = "input",
    ) -> None:
        """Creates A, B and the state of one adapter; A is `shared_A` where blocks share theirs."""
        d = self.in_features
        self.r[adapter_name] = r
        self.scaling[adapter_name] = scaling
        self.reads[adapter_name] = reads
        self.lor2c_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lor2c_A[adapter_name] = shared_A if shared_A is not None else nn.Linear(d, r, bias=False)
        self.lor2c_B[adapter_name] = _zero_unless(not init_weights, nn.Linear(r, d, bias=False))
        self.lor2c_state[adapter_name] = torch.tensor([0, 0, 1, 0], device="cpu")
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def create_pairs(
        self, adapter_name: str, linears: dict[str, tuple[int, int]], r: int, scaling: float, init_weights: bool
    ) -> None:
        """Creates the idle pairs for {path of a linear within the block: (in, out) features}."""
        self.inject_r[adapter_name] = r
        self.inject_scaling[adapter_name] = scaling
        self.lor2c_inject_A[adapter_name] = nn.ModuleDict(
            {_key(path): nn.Linear(in_features, r, bias=False) for path, (in_features, _) in linears.items()}
        )
        self.lor2c_inject_B[adapter_name] = nn.ModuleDict(
            {
                _key(path): _zero_unless(not init_weights, nn.Linear(r, out_features, bias=False))
                for path, (_, out_features) in linears.items()
            }
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def detach(self) -> None:
        """Leaves the block as it was before."""
        for handle in [*self._handles, *self._inject_handles]:
            handle.remove()
        block = self._block[0]
        del block.lor2c

    # What PEFT asks of a layer

    def get_base_layer(self) -> nn.Module:
        """The block."""
        return self._block[0]

    def _get_base_layer_device_and_dtype(self, base_layer):
        # A block has no weight of its own; quantised ones hold integers beside floats.
        for name, parameter in base_layer.named_parameters():
            if parameter.is_floating_point() and not name.startswith("lor2c."):
                return (None, None) if parameter.is_meta else (parameter.device, parameter.dtype)
        return None, None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises NotImplementedError: no weight of the block can hold a residual around it."""
        raise NotImplementedError(MERGE_REASON)

    def unmerge(self) -> None:
        """Nothing to do: nothing is ever merged."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter's weights and state, and the hooks that it alone had on linears."""
        super().delete_adapter(adapter_name)
        self._read.pop(adapter_name, None)
        self._hook_linears()

    # Forward

    def forward(self, hidden_states: torch.Tensor, adapter_name: str = "default") -> torch.Tensor:
        """The residual of one adapter's own weights: [..., d] -> [..., d], in the dtype of B's output."""
        factors = self.lor2c_A[adapter_name], self.lor2c_B[adapter_name]
        return self._low_rank(hidden_states, *factors, adapter_name, self.scaling[adapter_name])

    def _low_rank(self, x, A: Any, B: Any, adapter_name: str, scaling: float) -> torch.Tensor:
        # Contiguous: else torch picks its product by requires_grad of A, and a reloaded adapter is 3e-7 off (Whisper).
        x = self._cast_input_dtype(x.to(A.weight.device), A.weight.dtype).contiguous()
        return B(A(self.lor2c_dropout[adapter_name](x)) * scaling)

    def running(self) -> list[str]:
        """Adapters that take part in the forward now."""
        if self.disable_adapters:
            return []
        names = self.active_adapters if self.rows is None else list(self.rows)
        return [name for name in names if name in self.lor2c_state]

    def add_residual(self, h_in: torch.Tensor, h_out: torch.Tensor) -> torch.Tensor:
        """What the block's hook does: h_out [B, T, d] with every residual that is added at this block."""
        of_block = h_out
        for name in self.running():
            span = self.spans[name]
            if span is None:
                continue
            if self.in_features != h_out.shape[-1]:
                raise ConfigError(
                    f"{self.name}: a block that reads width {self.in_features} and puts out width {h_out.shape[-1]} "
                    "has no residual. Leave it out with exclude_modules."
                )
            here = self.number
            rows = None if self.rows is None else self.rows[name].to(h_out.device)
            if self.reads[name] == "output":
                if here < span.last:
                    continue
                delta = self.stack.layers[span.owner](of_block if rows is None else of_block[rows], name)
            elif not span.is_fused:
                delta = self(h_in if rows is None else h_in[rows], name)
            else:
                passed = h_in if here == span.first else self.stack.take(name)
                if here == span.owner:
                    passed = self(passed if rows is None else passed[rows], name)
                if here < span.last:
                    self.stack.hand_on(name, passed)
                    continue
                delta = passed
            delta = delta.to(h_out.device, h_out.dtype)
            h_out = h_out + delta if rows is None else h_out.index_add(0, rows, delta)
        return h_out

    def inject_into(self, key: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the hook on a linear of an injected block does: y = W x + (alpha / r) B(A(dropout(x)))."""
        for name in self.running():
            pairs = self.pairs(name) if name in self.injected() else {}
            if key not in pairs:
                continue
            rows = None if self.rows is None else self.rows[name].to(x.device)
            delta = self._low_rank(x if rows is None else x[rows], *pairs[key], name, self.inject_scaling[name])
            delta = delta.to(y.device, y.dtype)
            y = y + delta if rows is None else y.index_add(0, rows, delta)
        return y

    # Structure

    def pairs(self, adapter_name: str) -> dict[str, tuple[nn.Module, nn.Module]]:
        """{linear: (A, B)} of an adapter's pairs, idle or not."""
        A, B = (cast(nn.ModuleDict, c[adapter_name]) for c in (self.lor2c_inject_A, self.lor2c_inject_B))
        return {key: (A[key], B[key]) for key in A}

    def injected(self) -> list[str]:
        """Adapters by which this block is injected."""
        return [name for name in self.lor2c_inject_A if name in self._read and self.spans.get(name) is None]

    def is_up_to_date(self) -> bool:
        """Whether every state was read. Loading replaces buffers, or tells by the hook of `load_state_dict`."""
        states = self.lor2c_state
        if torch.compiler.is_compiling() or is_replica(self):  # of torch.nn.DataParallel
            return True
        return len(states) == len(self._read) and all(self._read.get(name) is states[name] for name in states)

    def set_span(self, adapter_name: str, span: Span | None) -> None:
        """What the stack read for this block: its module, or None where it is injected."""
        if span is None and adapter_name not in self.lor2c_inject_A:
            raise CheckpointError(
                f"{self.name} is injected in this adapter's state, but the adapter has no pairs: load it with "
                "injectable=True, as its adapter_config.json says."
            )
        self.spans[adapter_name] = span
        self._read[adapter_name] = self.lor2c_state[adapter_name]
        self._hook_linears()

    def _hook_linears(self) -> None:
        """Hooks on the linears of an injected block, and on no others: CR-Net's policies step back from hooks."""
        for handle in self._inject_handles:
            handle.remove()
        self._inject_handles = []
        keys = {key for name in self.injected() for key in self.pairs(name)}
        for path, linear in self._block[0].named_modules():
            if path.startswith("lor2c"):
                continue
            path = path.replace(".base_layer", "")  # another adapter's layer may have come in between
            if _key(path) in keys and not hasattr(linear, "base_layer"):
                self._inject_handles.append(linear.register_forward_hook(_InjectHook(self, _key(path))))

    def parameters_in_use(self, adapter_name: str) -> list[nn.Parameter]:
        """Those that the forward reads: of A and B where this block owns a module, of the pairs where injected."""
        span = self.spans[adapter_name]
        used: list[nn.Module] = []
        if span is None:
            used = [self.lor2c_inject_A[adapter_name], self.lor2c_inject_B[adapter_name]]
        elif span.owner == self.number:
            used = [self.lor2c_A[adapter_name], self.lor2c_B[adapter_name]]
        return [parameter for module in used for parameter in module.parameters()]


class Stack:
    """The layers of one list of blocks, by block number: where they learn who covers whom, and hand tensors on."""

    def __init__(self, layers: dict[int, LoR2CLayer]) -> None:
        self.layers = layers
        self.token = next(_numbers)

    def hand_on(self, adapter_name: str, tensor: torch.Tensor) -> None:
        """Leaves what the next block adds."""
        _handed_on.tensors[self.token, adapter_name] = tensor

    def take(self, adapter_name: str) -> torch.Tensor:
        """What a block before has left."""
        return _handed_on.tensors.pop((self.token, adapter_name))

    def read(self) -> None:
        """Reads the states of all adapters into `spans` of the layers."""
        for adapter_name in sorted({name for layer in self.layers.values() for name in layer.lor2c_state}):
            members = {n: layer for n, layer in self.layers.items() if adapter_name in layer.lor2c_state}
            spans: dict[int, Span | None] = {}
            for number, layer in members.items():
                before, after, has_module, is_injected = _read_state(layer.lor2c_state[adapter_name])
                if is_injected:
                    spans[number] = None
                elif has_module:
                    covered = range(number - before, number + after + 1)
                    if any(block in spans or block not in members for block in covered):
                        raise CheckpointError(f"{layer.name}: its state covers blocks {list(covered)}, some not free.")
                    spans.update(dict.fromkeys(covered, Span(covered[0], covered[-1], number)))
            if spans.keys() != members.keys():
                raise CheckpointError(f"No module covers blocks {sorted(members.keys() - spans.keys())}.")
            for number, layer in members.items():
                layer.set_span(adapter_name, spans[number])

    def write(self, adapter_name: str, spans: dict[int, Span | None]) -> None:
        """Writes {block number: the module that covers it, None where injected} into the states, and reads them."""
        for number, span in spans.items():
            if span is None:
                state = [0, 0, 0, 1]
            elif span.owner == number:
                state = [number - span.first, span.last - number, 1, 0]
            else:
                state = [0, 0, 0, 0]
            buffer = self.layers[number].lor2c_state[adapter_name]
            buffer.copy_(torch.tensor(state))
        self.read()


def _read_state(state: torch.Tensor) -> list[int]:
    return [0, 0, 1, 0] if state.is_meta else state.tolist()


class _InjectHook:
    """A forward hook on one linear of an injected block."""

    def __init__(self, layer: LoR2CLayer, key: str) -> None:
        self.layer, self.key = layer, key

    def __call__(self, linear: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return self.layer.inject_into(self.key, args[0], output)


def _before_block(block: nn.Module, args: tuple) -> None:
    layer = _layer_of(block)
    if not layer.is_up_to_date():
        layer.stack.read()


def _after_block(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Blocks put out h, or a tuple that begins with it."""
    layer = _layer_of(block)
    if not layer.running():
        return None
    h_in = args[0] if args else kwargs.get("hidden_states")
    if isinstance(output, torch.Tensor) and isinstance(h_in, torch.Tensor):
        return layer.add_residual(h_in, output)
    if isinstance(output, tuple) and output and isinstance(h_in, torch.Tensor):
        return (layer.add_residual(h_in, output[0]), *output[1:])
    raise ConfigError(
        f"{layer.name} takes {type(h_in).__name__} and returns {type(output).__name__}; a block takes hidden states "
        "(first argument, or hidden_states=...) and returns them, alone or first in a tuple."
    )


def _layer_of(block: nn.Module) -> LoR2CLayer:
    return cast(LoR2CLayer, block.lor2c)  # looked up anew: the block may be a copy or a replica


def _forget_structure(layer: LoR2CLayer, incompatible_keys: Any) -> None:
    """After load_state_dict: the next forward, or question, reads the states again."""
    layer._read.clear()


def _key(path: str) -> str:
    """A path within the block as a name that a ModuleDict takes."""
    return path.replace(".", "__")


def _zero_unless(condition: bool, linear: nn.Linear) -> nn.Linear:
    if not condition:
        nn.init.zeros_(linear.weight)
    return linear
