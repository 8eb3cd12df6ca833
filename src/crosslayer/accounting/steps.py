"""What a step works on, and on how many devices: precision, sharding, tokens."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bytes of an element. `products` below `weights` is autocast: matrix products in it, the rest in `weights`.

    `gathered`: of weights that FSDP gathers; None is their own, `products` is FSDP's mixed precision. `tf32`: float32
    products on tensor cores, which round their inputs to 10 bits.
    """

    weights: int = 4
    gradients: int = 4
    states: int = 4
    products: int = 4
    gathered: int | None = None
    tf32: bool = False

    @property
    def dtype(self) -> str:
        """Of the products: float32, tf32 or bfloat16."""
        return "bfloat16" if self.products == 2 else "tf32" if self.tf32 else "float32"

    @property
    def on_the_way(self) -> int:
        """Of weights that FSDP gathers."""
        return self.weights if self.gathered is None else self.gathered

    @property
    def is_autocast(self) -> bool:
        """Whether products have fewer bytes than the weights."""
        return self.products < self.weights

    @property
    def at_least_float32(self) -> int:
        """Norms and CR-Net's carried state."""
        return max(4, self.weights)


PRECISIONS = {
    "float32": Precision(),
    "tf32": Precision(tf32=True),
    "bf16": Precision(weights=2, gradients=2, states=2, products=2),
    "bf16_autocast": Precision(products=2),
}


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How many devices share what: `tensor` x `fsdp` x `replicas` of them, in this order, neighbours first.

    Args:
        replicas: copies of the model beside one another; DDP, which holds a second copy of the gradients in its
            buckets where `fsdp` is 1.
        fsdp: devices that share weights, gradients and states (ZeRO-3, arXiv 1910.02054; FSDP2).
        tensor: devices that split each layer by layout R (crnet/tensor_parallel.py), dense models by Megatron's
            (arXiv 1909.08053); norms, hidden states, rank-r products and logits stay whole on each.
    """

    replicas: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Devices, or groups of `tensor` devices, that each take their own micro-batch."""
        return self.replicas * self.fsdp

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.tensor

    def __str__(self) -> str:
        return f"{self.tensor} x {self.fsdp} x {self.replicas}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step works on.

    Args:
        sequence, micro_batch: tokens of a sequence, sequences of a micro-batch.
        precision: bytes of the elements.
        sharding: over devices.
        fused_loss: the loss is taken by vocabulary chunks (`CRNetForCausalLM.fused_loss`, our recipes).
        fused_norms: the norm keeps its input and output, not what lies between: CUDA's kernel. False on a CPU,
            and `passes.py` then counts a CPU's kernels elsewhere too.
        fused_optimizer: AdamW updates in place (`adamw_torch_fused`, the Trainer's default); otherwise one more copy of
            the parameters passes by.
        accumulates: gradients of earlier micro-batches are there already.
        reduces_each_batch: FSDP reduces gradients after every micro-batch (`sync_each_batch`); otherwise those of
            earlier ones are whole on every device, unless there are replicas.
        releases_gradients: the optimizer steps within the backward, so that only one block's gradients are there.
    """

    sequence: int
    micro_batch: int = 1
    precision: Precision = field(default_factory=Precision)
    sharding: Sharding = field(default_factory=Sharding)
    fused_loss: bool = True
    fused_norms: bool = True
    fused_optimizer: bool = True
    accumulates: bool = False
    reduces_each_batch: bool = True
    releases_gradients: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.sequence * self.micro_batch


__all__ = ["PRECISIONS", "Precision", "Sharding", "Step"]
