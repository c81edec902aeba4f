"""Decoding and prefill at the shape of Qwen3-0.6B: Setun against llama.cpp with TQ2_0.

    python bench/compare_llama.py [--setun target/release/setun] [--threads 2] [--context 16 512]

Needs numpy, gguf and llama-cpp-python (built from source, so that it uses this machine's
instructions). Both run random ternary weights, Setun in groups of 128 and llama.cpp in
blocks of 256, which is what it has x86 kernels for. The two take turns, so that a busy
moment of the machine meets both; figures are medians over the rounds.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

LAYERS, HIDDEN, INTERMEDIATE = 28, 1024, 3072
HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 16, 8, 128, 151_936
# A TQ2_0 block: 256 codes of two bits, then an f16 scale.
BLOCK, BLOCK_BYTES = 256, 66


def random_matrix(rng, rows, cols):
    """Rows of TQ2_0 blocks as bytes, with trits of equal frequency."""
    codes = np.array([[c // 27, c // 9 % 3, c // 3 % 3, c % 3] for c in range(81)], np.uint8)
    packed = (codes << np.array([0, 2, 4, 6], np.uint8)).sum(1).astype(np.uint8)
    blocks = rows * cols // BLOCK
    data = np.empty((blocks, BLOCK_BYTES), np.uint8)
    data[:, :64] = packed[rng.integers(0, 81, (blocks, 64))]
    data[:, 64:] = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)
    return data.reshape(rows, cols // BLOCK * BLOCK_BYTES)


def write_model(path):
    """A GGUF file of the shape with random weights and no vocabulary of its own."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(40_960)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("none")

    def matrix(name, rows, cols):
        data = random_matrix(rng, rows, cols)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.TQ2_0)

    def norm(name, width):
        writer.add_tensor(name, np.ones(width, np.float32))

    matrix("token_embd.weight", VOCABULARY, HIDDEN)
    norm("output_norm.weight", HIDDEN)
    for i in range(LAYERS):
        norm(f"blk.{i}.attn_norm.weight", HIDDEN)
        norm(f"blk.{i}.ffn_norm.weight", HIDDEN)
        norm(f"blk.{i}.attn_q_norm.weight", HEAD_DIM)
        norm(f"blk.{i}.attn_k_norm.weight", HEAD_DIM)
        matrix(f"blk.{i}.attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{i}.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{i}.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{i}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        matrix(f"blk.{i}.ffn_gate.weight", INTERMEDIATE, HIDDEN)
        matrix(f"blk.{i}.ffn_up.weight", INTERMEDIATE, HIDDEN)
        matrix(f"blk.{i}.ffn_down.weight", HIDDEN, INTERMEDIATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """llama.cpp with the model loaded."""

    def __init__(self, path, threads, context):
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p(0))
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise SystemExit("error: llama.cpp cannot load the model; is it 0.3.36 or later?")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, params)

    def run(self, count):
        """Seconds for `count` more tokens in one batch."""
        tokens = (self.api.llama_token * count)(*[(7 * i + 1) % 1000 for i in range(count)])
        start = time.perf_counter()
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, count)):
            raise SystemExit("error: llama.cpp refused a batch")
        self.api.llama_synchronize(self.context)
        return time.perf_counter() - start

    def clear(self):
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def decode(self, past, steps=16):
        """Seconds for one token behind `past` others."""
        self.clear()
        for start in range(0, past, 512):
            self.run(min(512, past - start))
        self.run(1)
        return statistics.median(self.run(1) for _ in range(steps))

    def prefill(self, count):
        self.clear()
        return self.run(count)


def setun(program, benchmark, tokens, threads):
    """Seconds of a step."""
    command = [program, "bench", benchmark, "--tokens", str(tokens), "--threads", str(threads)]
    output = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    return json.loads(output.stdout)["figures"][0]["seconds"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setun", default="target/release/setun")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, nargs="+", default=[16, 512])
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    cases = [("decode", n) for n in args.context] + [("prefill", 512)]
    times = {case: ([], []) for case in cases}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        write_model(path)
        llama = Llama(path, args.threads, max(args.context) + 600)
        for _ in range(args.rounds):
            for (kind, tokens), (ours, theirs) in times.items():
                ours.append(setun(args.setun, kind, tokens, args.threads))
                theirs.append(getattr(llama, kind)(tokens))
    figures = []
    print(f"{args.threads} threads, tokens/s, medians of {args.rounds} rounds")
    print(f"{'':24}{'Setun':>10}{'TQ2_0':>10}{'ratio':>8}")
    for (kind, tokens), both in times.items():
        work = tokens if kind == "prefill" else 1
        ours, theirs = (work / statistics.median(seconds) for seconds in both)
        name = f"{kind} {'of' if kind == 'prefill' else 'at'} {tokens}"
        print(f"{name:24}{ours:10.1f}{theirs:10.1f}{ours / theirs:8.2f}")
        figures.append(dict(name=name, setun=ours, llama_cpp=theirs, ratio=ours / theirs))
    if args.json:
        Path(args.json).write_text(json.dumps(dict(threads=args.threads, figures=figures), indent=2))


if __name__ == "__main__":
    main()
