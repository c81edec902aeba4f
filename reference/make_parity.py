"""Writes a small parity case: a random Qwen3 checkpoint and what transformers computes.

    python reference/make_parity.py OUT_DIRECTORY

Needs torch, transformers and safetensors. `tests/parity.rs` of setun-train reads the
result; the case in `crates/setun-train/tests/data/parity/small` was made with it. Widths
are odd on purpose: every matrix has a short last group.
"""

import json
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

GROUP = 128
CONFIG = dict(
    vocab_size=97, hidden_size=136, intermediate_size=150, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=10, max_position_embeddings=64,
    rms_norm_eps=1e-6, tie_word_embeddings=False, initializer_range=0.1,
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
)


def project(weight):
    """Scales [rows, groups] and trits of a latent matrix."""
    rows, cols = weight.shape
    groups = -(-cols // GROUP)
    padded = F.pad(weight.detach().double(), (0, groups * GROUP - cols)).view(rows, groups, GROUP)
    count = torch.full((groups,), float(GROUP), dtype=torch.float64)
    count[-1] = cols - (groups - 1) * GROUP
    scale = (padded.abs().sum(-1) / count).bfloat16().double()
    scale[scale < 2.0**-17] = 0.0
    trits = torch.where(padded.abs() > scale[..., None] / 2, padded.sign(), 0.0)
    trits = torch.where(scale[..., None] > 0, trits, 0.0)
    return scale, trits.view(rows, groups * GROUP)[:, :cols]


def effective(weight):
    """s * t in the forward pass, the identity in the backward pass."""
    scale, trits = project(weight)
    spread = scale.repeat_interleave(GROUP, dim=1)[:, : weight.shape[1]]
    return weight + ((spread * trits).to(weight.dtype) - weight).detach()


class TernaryLinear(torch.nn.Linear):
    def forward(self, x):
        return F.linear(x, effective(self.weight))


class TernaryEmbedding(torch.nn.Embedding):
    def forward(self, ids):
        return F.embedding(ids, effective(self.weight))


def loss_of(logits, ids):
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def train(model, ids):
    """Six losses around five steps of AdamW."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim > 1]
    norms = [p for p in parameters if p.ndim == 1]
    groups = [dict(params=matrices, weight_decay=0.01), dict(params=norms, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for _ in range(6):
        loss = loss_of(model(input_ids=ids, use_cache=False).logits, ids)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return torch.tensor(losses)


def main(out):
    torch.manual_seed(7)
    config = Qwen3Config(**CONFIG)
    model = Qwen3ForCausalLM(config).float()
    ids = torch.randint(0, config.vocab_size, (2, 19))
    expected = {"input_ids": ids}
    dense = model(input_ids=ids, use_cache=False).logits
    expected["dense.logits"] = dense.detach()
    expected["dense.loss"] = loss_of(dense, ids).detach()
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = TernaryLinear
        elif type(module) is torch.nn.Embedding:
            module.__class__ = TernaryEmbedding
    logits = model(input_ids=ids, use_cache=False).logits
    loss = loss_of(logits, ids)
    loss.backward()
    expected["ternary.logits"] = logits.detach()
    expected["ternary.loss"] = loss.detach()
    for name, p in model.named_parameters():
        expected[f"ternary.grad.{name}"] = p.grad.clone()
        if p.ndim == 2:
            scale, trits = project(p)
            expected[f"ternary.scale.{name}"] = scale.float()
            expected[f"ternary.trits.{name}"] = trits.to(torch.int8)
    expected["ternary.train_loss"] = train(model, ids)
    save_file({k: v.contiguous() for k, v in expected.items()}, out / "expected.safetensors")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
