"""Ternary layers for PyTorch: every matrix of a Qwen3 of transformers, by groups of 128."""

import torch
import torch.nn.functional as F

GROUP = 128


def ternary(weight, exact):
    """s * t of each group of 128 along the rows; the gradient passes straight through.

    `exact` gives the scales of Setun, mean |w| rounded to bf16; without it they are f32, which
    is what others do and costs less.
    """
    grouped = weight.view(weight.shape[0], -1, GROUP)
    if exact:
        scale = grouped.abs().double().mean(-1, keepdim=True).float().bfloat16().float()
        projected = grouped.sign() * (grouped.abs() > scale / 2) * scale
    else:
        scale = grouped.abs().mean(-1, keepdim=True).clamp_min(1e-8)
        projected = (grouped / scale).round().clamp(-1, 1) * scale
    return weight + (projected.view_as(weight) - weight).detach()


class Linear(torch.nn.Linear):
    exact = False

    def forward(self, x):
        return F.linear(x, ternary(self.weight, self.exact))


class Embedding(torch.nn.Embedding):
    exact = False

    def forward(self, ids):
        return F.embedding(ids, ternary(self.weight, self.exact))


def make_ternary(model, exact=False):
    """Gives every linear layer and embedding of `model` ternary weights."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear
        elif type(module) is torch.nn.Embedding:
            module.__class__ = Embedding
        else:
            continue
        module.exact = exact
    return model
