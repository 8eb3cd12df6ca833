"""Other people's methods, written out in a few lines on transformers' Llama: what accounting is compared with."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def llama(**fields):
    fields.pop("rank", None)
    return LlamaForCausalLM(LlamaConfig(vocab_size=101, **fields)).train()


class Residual(nn.Module):
    """LoR2C around a block: h_out = block(h) + h A B."""

    def __init__(self, block, width, rank):
        super().__init__()
        self.block = block
        self.A, self.B = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, hidden_states, **arguments):
        return self.block(hidden_states, **arguments) + self.B(self.A(hidden_states))


class SLTrainProduct(torch.autograd.Function):
    """x (B A + S)^T; W is made for the forward and made again for the backward (arXiv 2406.02214)."""

    @staticmethod
    def forward(ctx, x, A, B, values, indices):
        ctx.save_for_backward(x, A, B, values, indices)
        return x @ SLTrainProduct.weight(A, B, values, indices).t()

    @staticmethod
    def weight(A, B, values, indices):
        return (B @ A).view(-1).scatter_add(0, indices, values).view(B.shape[0], A.shape[1])

    @staticmethod
    def backward(ctx, gradient):
        x, A, B, values, indices = ctx.saved_tensors
        W = SLTrainProduct.weight(A, B, values, indices)
        dW = gradient.flatten(0, 1).t() @ x.flatten(0, 1)
        return gradient @ W, B.t() @ dW, dW @ A.t(), dW.view(-1)[indices], None


class SLTrainLinear(nn.Module):
    def __init__(self, linear, rank, density):
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.A = nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.B = nn.Parameter(torch.randn(out_features, rank) / rank**0.5)
        entries = int(density * in_features * out_features)
        self.values = nn.Parameter(torch.zeros(entries))
        self.register_buffer("indices", torch.randperm(in_features * out_features)[:entries])

    def forward(self, x):
        return SLTrainProduct.apply(x, self.A, self.B, self.values, self.indices)


def sltrain_model(density, rank, **fields):
    model = llama(**fields)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, SLTrainLinear(child, rank, density))
    return model
