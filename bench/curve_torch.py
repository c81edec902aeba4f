"""The same training in Setun and in PyTorch: weights, batches, learning rates, optimizer.

A random Qwen3 of transformers is saved, trained by `setun train --init` in the numerics f32,
bf16 and int8, and by PyTorch in f32 and under bf16 autocast, on batches that
`crates/setun-train/examples/batches.rs` writes. The table has the first loss and gradient
norm, and how far the curves lie apart.

    cargo build --release -p setun
    cargo build --release -p setun-train --example batches
    python bench/curve_torch.py [--steps 200] [--json FILE]    # torch, transformers, tokenizers
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import tempfile

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from torch_ternary import make_ternary

ROOT = pathlib.Path(__file__).resolve().parent.parent
BATCH, SEQ, VOCAB = 8, 128, 1024
LR, DECAY = 2e-3, 0.1


def new_model(path):
    """A random model whose matrices have the deviation fan_in^-0.5."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        rope_theta=1e6,
    )
    model = Qwen3ForCausalLM(config).float()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    model.save_pretrained(path)


def setun(*arguments):
    program = ROOT / "target/release/setun"
    subprocess.run([program, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def train_setun(work, model, numerics, steps):
    run = work / numerics
    settings = {
        "data.train": ROOT / "data/encyclopedia.txt",
        "run.output": run,
        "model.numerics": numerics,
        "train.steps": steps,
        "train.batch_size": BATCH,
        "train.seq_len": SEQ,
        "train.lr": LR,
        "train.weight_decay": DECAY,
        "train.schedule": "cosine",
        "train.warmup_steps": 20,
        "train.spike_sigma": 0,
        "eval.every": 0,
        "checkpoint.every": 0,
        "sample.prompts": 0,
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    # Without exports: the comparison is of the training.
    setun("train", "--init", model, *flags, "--export.formats=")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "step"]


def train_torch(model, batches, rates, autocast):
    model = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32)
    make_ternary(model, exact=True)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [dict(params=matrices, weight_decay=DECAY), dict(params=norms, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    curve = []
    for batch, rate in zip(batches, rates):
        inputs, targets = batch.view(2, BATCH, SEQ)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.float().view(-1, VOCAB), targets.reshape(-1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        curve.append(dict(loss=loss.item(), grad_norm=norm.item()))
    return curve


def compare(curves):
    """Rows of the table: each curve against that of PyTorch in f32."""
    base = curves["torch f32"]
    rows = []
    for name, curve in curves.items():
        apart = [a["loss"] - b["loss"] for a, b in zip(curve, base)]
        first = abs(apart[0]) / base[0]["loss"]
        norm = abs(curve[0]["grad_norm"] / base[0]["grad_norm"] - 1)
        tail = apart[-len(apart) // 4 :]
        rows.append(
            dict(
                name=name,
                first_loss=curve[0]["loss"],
                first_loss_apart=first,
                first_norm_apart=norm,
                largest_apart=max(map(abs, apart)),
                last_quarter_loss=statistics.mean(c["loss"] for c in curve[-len(tail) :]),
                last_quarter_apart=statistics.mean(tail),
            )
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        model, tokens = work / "model", work / "batches"
        new_model(model)
        corpus = ROOT / "data/encyclopedia.txt"
        tokenizer = work / "tokenizer.json"
        setun("tokenizer", "train", "--vocab-size", VOCAB, "--output", tokenizer, corpus)
        shutil.copy(tokenizer, model / "tokenizer.json")
        curves = {}
        for numerics in ("f32", "bf16", "int8"):
            curves[f"setun {numerics}"] = train_setun(work, model, numerics, args.steps)
        dump = ROOT / "target/release/examples/batches"
        subprocess.run([dump, work / "f32", str(args.steps), tokens], check=True)
        batches = torch.from_file(
            str(tokens), dtype=torch.int32, size=args.steps * 2 * BATCH * SEQ
        )
        batches = batches.view(args.steps, -1).long()
        rates = [line["lr"] for line in curves["setun f32"]]
        for name, autocast in (("torch f32", False), ("torch bf16", True)):
            curves[name] = train_torch(model, batches, rates, autocast)
    rows = compare(curves)
    columns = "{:<12}{:>12}{:>12}{:>12}{:>12}{:>14}{:>14}"
    print(columns.format("", "first loss", "apart", "norm apart", "largest", "last quarter", "apart"))
    for row in rows:
        shown = [
            f"{row['first_loss']:.6f}",
            f"{row['first_loss_apart']:.1e}",
            f"{row['first_norm_apart']:.1e}",
            f"{row['largest_apart']:.4f}",
            f"{row['last_quarter_loss']:.4f}",
            f"{row['last_quarter_apart']:+.4f}",
        ]
        print(columns.format(row["name"], *shown))
    if args.json:
        losses = {name: [round(c["loss"], 5) for c in curve] for name, curve in curves.items()}
        args.json.write_text(json.dumps(dict(table=rows, losses=losses)) + "\n")


main()
