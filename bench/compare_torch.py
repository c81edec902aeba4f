"""PyTorch's side of compare_torch.sh, and the table of both sides.

Each measurement prints one JSON object with a list of figures, as `setun bench --json`
does: name, seconds, rate, unit, and errors where there are any.
"""

import argparse
import json
import resource
import statistics
import time

# The path-b shape, as in recipes/path-b.toml.
PATH_B = dict(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=8192,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
    rope_theta=1e6,
)
BATCH, SEQ = 16, 256
# bf16 where nothing else is said: without AMX or AVX-512 PyTorch's bf16 products are slow.
MODES = ["eager", "compiled", "eager f32", "compiled f32"]


def median_seconds(steps, run):
    """Median time of `run` after one run that warms up."""
    run()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def figure(name, seconds, work, unit, **facts):
    return dict(name=name, seconds=seconds, rate=work / seconds, unit=unit, **facts)


def train(args):
    """Whole steps: forward in bf16 autocast or in f32, backward, clipping, fused AdamW."""
    import torch
    import torch.nn.functional as F
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from torch_ternary import make_ternary

    torch.manual_seed(0)
    model = make_ternary(Qwen3ForCausalLM(Qwen3Config(**PATH_B)).float())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if args.mode.startswith("compiled") else model
    in_bf16 = not args.mode.endswith("f32")
    vocab = PATH_B["vocab_size"]

    def step():
        inputs = torch.randint(0, vocab, (BATCH, SEQ))
        targets = torch.randint(0, vocab, (BATCH, SEQ))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bf16):
            logits = forward(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.float().view(-1, vocab), targets.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = median_seconds(args.steps, step)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [figure(f"train {args.mode}", seconds, BATCH * SEQ, "tokens/s", resident_MiB=resident)]


def attention(args):
    """Causal scaled_dot_product_attention in bf16, 8 heads."""
    import torch
    import torch.nn.functional as F

    heads = 8
    shape = (1, heads, args.seq, args.head_dim)
    q, k, v = (torch.rand(shape).bfloat16().requires_grad_() for _ in range(3))
    dout = torch.rand(shape).bfloat16()
    run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    forward = median_seconds(args.steps, run)
    out = run()
    backward = median_seconds(
        args.steps, lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    )
    product = args.seq * (args.seq + 1) / 2 * heads * args.head_dim / 1e9
    name = f"seq {args.seq}, {heads} x {args.head_dim}"
    return [
        figure(f"attention forward, {name}", forward, 2 * product, "G MAC/s"),
        figure(f"attention backward, {name}", backward, 5 * product, "G MAC/s"),
    ]


def uniform(stream, count):
    """The values of `setun bench`: an integer hash of the index, between -1 and 1."""
    import numpy as np

    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint32) + np.uint32(stream * 0x9E3779B9 & 0xFFFFFFFF)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        x = x ^ (x >> np.uint32(16))
    return (x >> np.uint32(8)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def norms(args):
    """LayerNorm and RMSNorm; every second row has mean 1e4 and spread 1e-3."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    rows, width = args.rows, args.width
    values = uniform(1, rows * width).reshape(rows, width)
    values[::2] = np.float32(1e4) + np.float32(1e-3) * values[::2]
    x = torch.from_numpy(values)
    dy = torch.from_numpy(uniform(2, rows * width).reshape(rows, width))
    gamma = torch.from_numpy(uniform(3, width))
    beta = torch.zeros(width)

    def error(got, exact):
        return ((got.double() - exact).norm() / exact.norm()).item()

    figures = []
    operations = [
        ("layer norm", lambda x, g, b: F.layer_norm(x, (width,), g, b, 1e-5), (gamma, beta), 12),
        ("rms norm", lambda x, g: F.rms_norm(x, (width,), g, 1e-6), (gamma,), 16),
    ]
    for name, norm, weights, moved in operations:
        inputs = [t.clone().requires_grad_() for t in (x, *weights)]
        exact = [t.double().requires_grad_() for t in (x, *weights)]
        y = norm(*inputs)
        run = lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)
        got = run()
        expected = torch.autograd.grad(norm(*exact), exact, dy.double())
        facts = dict(dx_error=error(got[0], expected[0]), dgamma_error=error(got[1], expected[1]))
        count = rows * width / 1e9
        forward = median_seconds(args.steps, lambda: norm(*inputs))
        backward = median_seconds(args.steps, run)
        figures.append(figure(f"{name} forward, {rows} x {width}", forward, 8 * count, "GB/s"))
        figures.append(
            figure(f"{name} backward, {rows} x {width}", backward, moved * count, "GB/s", **facts)
        )
    return figures


def topk(args):
    """softmax and topk of [rows, vocabulary] logits in f32."""
    import torch

    vocab, k = 151_936, 64
    logits = 3 * torch.randn(args.rows, vocab)
    seconds = median_seconds(args.steps, lambda: logits.softmax(-1).topk(k))
    read = 4 * args.rows * vocab / 1e9
    return [figure(f"softmax + top-{k} of [{args.rows}, {vocab}]", seconds, read, "GB/s")]


def table(paths):
    """Medians over all files; training against every PyTorch variant."""
    ours, theirs = {}, {}
    for path in paths:
        with open(path) as file:
            record = json.load(file)
        side = theirs if record.get("peer") == "torch" else ours
        for one in record["figures"]:
            side.setdefault(one["name"], []).append(one)
    middle = lambda figures, key: statistics.median(f[key] for f in figures)
    columns = "{:<42}{:>12}{:>12}{:>8}  {}"
    print(columns.format("", "setun", "torch", "ratio", "unit"))
    for name, figures in sorted(ours.items()):
        training = name.startswith("train ")
        # Only names that training has on the other side begin alike.
        peers = [f for n, f in theirs.items() if (n.startswith("train ") if training else n == name)]
        if not peers:
            continue
        for peer in peers:
            mine, other = middle(figures, "seconds"), middle(peer, "seconds")
            unit = figures[0]["unit"] + (f" ({peer[0]['name']})" if training else "")
            rates = [f"{middle(f, 'rate'):.1f}" for f in (figures, peer)]
            print(columns.format(name, *rates, f"{other / mine:.2f}", unit))
            for key in ("resident_MiB", "dx_error", "dgamma_error"):
                if key in figures[0] and key in peer[0]:
                    values = [middle(f, key) for f in (figures, peer)]
                    shown = [f"{v:.0f}" if key == "resident_MiB" else f"{v:.2e}" for v in values]
                    print(columns.format("", *shown, "", key))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "attention", "norms", "topk"):
        command = commands.add_parser(name)
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--steps", type=int, default=5)
        if name == "train":
            command.add_argument("--mode", choices=MODES, default="eager")
        elif name == "attention":
            command.add_argument("--seq", type=int, default=1024)
            command.add_argument("--head-dim", type=int, default=64)
        elif name == "topk":
            command.add_argument("--rows", type=int, default=1)
        else:
            command.add_argument("--rows", type=int, default=4096)
            command.add_argument("--width", type=int, default=1024)
    commands.add_parser("table").add_argument("paths", nargs="+")
    args = parser.parse_args()
    if args.command == "table":
        table(args.paths)
        return
    import torch

    torch.set_num_threads(args.threads)
    run = {"train": train, "attention": attention, "norms": norms, "topk": topk}[args.command]
    print(json.dumps(dict(peer="torch", torch=torch.__version__, figures=run(args))))


main()
