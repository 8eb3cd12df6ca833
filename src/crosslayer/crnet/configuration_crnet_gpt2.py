"""Configuration of CR-Net on GPT-2's block."""

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

from .configuration_cross_layer import CrossLayerFields
from .positions import Position


@strict
class CRNetGPT2Config(CrossLayerFields, GPT2Config):
    """CR-Net on GPT-2's block: `GPT2Config` with the fields of `CrossLayerFields`."""

    __doc__ = CrossLayerFields.__doc__  # for help(): the fields
    model_type = "crnet_gpt2"
    base_model_tp_plan = {"wte": "embedding_rowwise", "h.*": "crosslayer_block"}
    unsupported = ("add_cross_attention", "reorder_and_upcast_attn")

    def positions(self, layer_idx: int) -> dict[str, Position]:
        """Six, all with biases: GPT-2's fused q, k and v as three, o, and an MLP without a gate."""
        h, f = self.hidden_size, self.n_inner or 4 * self.hidden_size
        return {
            **{p: Position(f"attn.{p}_proj", h, h, bias=True) for p in ("q", "k", "v")},
            "o": Position("attn.c_proj", h, h, bias=True),
            "up": Position("mlp.c_fc", h, f, bias=True),
            "down": Position("mlp.c_proj", f, h, bias=True),
        }

    @property
    def position_embedding_parameters(self) -> int:
        """Parameters of the learned position embeddings."""
        return self.n_positions * self.n_embd

    def norm_parameters(self, layer_idx: int | None) -> int:
        """As many norms as Llama's, each with a bias."""
        return 2 * super().norm_parameters(layer_idx)  # with biases
