"""What a LoR2C adapter is made of: the PEFT configuration."""

from dataclasses import dataclass, field
from enum import Enum

from peft import PeftConfig

from ..errors import ConfigError
from ..ranges import GROUP_STARTS

READS = ("input", "output")


class LoR2CPeftType(str, Enum):  # noqa: UP042 - as peft's own PeftType, which cannot be extended
    """The name under which PEFT knows the method."""

    LOR2C = "LOR2C"


@dataclass
class LoR2CConfig(PeftConfig):
    """Configuration of LoR2C: one low-rank residual around each whole block (arXiv 2503.00572).

        h_out = Block(h_in) + (lor2c_alpha / r) B(A(dropout(h_in)))      A: d -> r,  B: r -> d

    Defaults of r, alpha and dropout are the paper's for GLUE.

    Args:
        r: rank of every module.
        lor2c_alpha: numerator of the scaling.
        lor2c_dropout: dropout on the input of A.
        use_rslora: scale by alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732).
        init_weights: B = 0, so that training starts from the base model. False draws B too (tests, merging studies).
        target_modules: the blocks, as names (or endings of names) or one regular expression over whole names.
            None takes the model's longest list of blocks; in an encoder-decoder, that of each half.
        exclude_modules: blocks left out, given the same way.
        layers_to_transform: numbers of the blocks to adapt, within their list.
        layers_pattern: name of the list that `layers_to_transform` counts in.
        rank_pattern: {name or regular expression of a block: r}.
        alpha_pattern: {name or regular expression of a block: lor2c_alpha}.
        modules_to_save: modules trained and saved whole, a classifier for one.
        reads: "input" of the block (the paper), or its "output": as many parameters in the same places without the path
            around the block, h_out = h + (lor2c_alpha / r) B(A(dropout(h))) with h = Block(h_in). The ablation of the
            residual; an adapter in series instead of in parallel (arXiv 2110.04366).
        share_A: True: all blocks use one A and keep their own B (ShareLoR2C). A list shares within groups of
            neighbouring blocks: the numbers of the blocks at which a new A begins, as [0, 2, 5] for blocks 0-1, 2-4 and
            5 to the last. Blocks are counted 0, 1, ... over those that the adapter goes around, in the model's order;
            [0] is True. `crosslayer.analysis.sharing.share_groups` finds groups from spectra.
        injectable: create the pairs that `inject` switches on, one for each inject target of each block. They exist,
            idle, from the start, so that optimizer and checkpoints never change shape. None: true if another
            `inject_*` option is given.
        inject_r: rank of such a pair; None = r // 2, which costs as many parameters as the module it replaces.
        inject_alpha: numerator of their scaling; None = lor2c_alpha.
        inject_target_modules: names of linears within a block; None = its query and value (or its fused projection).
        hidden_size: width of the residual stream, where it cannot be read off the block.
        structure: fused and injected modules as names, for readers: written on saving. The state dict decides.
    """

    r: int = field(default=8, metadata={"help": "Rank of every module."})
    lor2c_alpha: float = field(default=16, metadata={"help": "The residual is scaled by lor2c_alpha / r."})
    lor2c_dropout: float = field(default=0.1, metadata={"help": "Dropout on the input of A."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lor2c_alpha / sqrt(r)."})
    init_weights: bool = field(default=True, metadata={"help": "Start with B = 0: the base model unchanged."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "The blocks: names, or one regular expression. None: the longest list."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Blocks left out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of the blocks."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    rank_pattern: dict = field(default_factory=dict, metadata={"help": "{block: r}"})
    alpha_pattern: dict = field(default_factory=dict, metadata={"help": "{block: lor2c_alpha}"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    reads: str = field(default="input", metadata={"help": "The block's `input` (the paper) or `output` (ablation)."})
    share_A: bool | list[int] = field(
        default=False, metadata={"help": "One A for all blocks, or the blocks at which a new A begins."}
    )
    injectable: bool | None = field(default=None, metadata={"help": "Create the pairs that `inject` switches on."})
    inject_r: int | None = field(default=None, metadata={"help": "Rank of an injected pair. None: r // 2."})
    inject_alpha: float | None = field(default=None, metadata={"help": "None: lor2c_alpha."})
    inject_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linears within a block. None: query and value."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the residual stream."})
    structure: dict | None = field(default=None, metadata={"help": "Fused and injected modules, for readers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LoR2CPeftType.LOR2C
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.injectable is None:
            given = (self.inject_r, self.inject_alpha, self.inject_target_modules)
            self.injectable = any(value is not None for value in given)
        problems = self._problems()
        if problems:
            raise ConfigError("LoR2CConfig: " + "; ".join(problems) + ".")

    def _problems(self) -> list[str]:
        problems = []
        ranks = {"r": self.r, "inject_r": self.inject_r}
        ranks.update({f"rank_pattern[{name!r}]": rank for name, rank in self.rank_pattern.items()})
        for name, rank in ranks.items():
            if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0):
                problems.append(f"{name}={rank!r} must be a positive integer")
        if not 0 <= self.lor2c_dropout < 1:
            problems.append(f"lor2c_dropout={self.lor2c_dropout!r} must lie in [0, 1)")
        if not isinstance(self.share_A, bool) and not GROUP_STARTS.holds(self.share_A):
            problems.append(f"share_A={self.share_A!r} must be true, false or {GROUP_STARTS.words}")
        if self.reads not in READS:
            problems.append(f"reads={self.reads!r} must be one of {', '.join(READS)}")
        if self.target_modules == "all-linear":
            problems.append(
                "target_modules='all-linear' names linears, but LoR2C goes around whole blocks: leave it out, or name "
                "blocks such as 'layers.0'"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("layers_pattern needs layers_to_transform")
        if not self.injectable and any((self.inject_r, self.inject_alpha, self.inject_target_modules)):
            problems.append("inject_* options are given although injectable=False")
        return problems

    @property
    def group_starts(self) -> list[int] | None:
        """Numbers of the blocks whose A is new, shared by the blocks up to the next one; None where none is shared."""
        if isinstance(self.share_A, bool):
            return [0] if self.share_A else None
        return self.share_A

    def scaling(self, alpha: float, r: int) -> float:
        """alpha / r, or alpha / sqrt(r) with `use_rslora`."""
        return alpha / (r**0.5 if self.use_rslora else r)
