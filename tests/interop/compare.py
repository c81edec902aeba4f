"""Runs a ternary model of Setun's in the programs that read its files, and compares.

    compare.py --setun BINARY --model RUN --text HELD_OUT.txt

Converts the model with `setun convert` and loads it in whatever is installed of
transformers (unpacked directory), llama-cpp-python (GGUF Q2_0), mlx-lm (MLX directory)
and gguf (the file itself). For each: perplexity on the same tokens, distance of logits,
and greedy text from five prompts. A difference of texts counts only if it does not begin
at a near-tie of the two best tokens. What is not installed is named and skipped. Exit
code 1 if a limit is broken or nothing was compared.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

SEQ_LEN = 256
MAX_CHARS = 12_000
NUM_PROMPTS = 5
PROMPT_CHARS = 80
NEW_TOKENS = 32
NEAR_TIE = 0.05  # nats between two tokens, for arithmetic of other roundings
MAX_PERPLEXITY = 0.005  # relative, against the model in the arithmetic that it ships with
MAX_LOGITS = 1e-4  # relative to the largest logit, where both compute in f32


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def perplexity(windows):
    """Of each next token in its window; `windows` has (ids, logits)."""
    losses = [
        -log_softmax(logits[:-1])[np.arange(len(ids) - 1), ids[1:]] for ids, logits in windows
    ]
    return float(np.exp(np.concatenate(losses).mean()))


class Setun:
    def __init__(self, binary, directory):
        self.binary, self.directory = binary, directory

    def run(self, *arguments):
        done = subprocess.run(
            [self.binary, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"setun {' '.join(map(str, arguments))}: {done.stderr}")
        return done.stdout

    def convert(self, model, name, form):
        self.run("convert", model, self.directory / name, "--to", form)
        return self.directory / name

    def windows(self, model, text, numerics):
        file = self.directory / f"{numerics}.safetensors"
        self.run("eval", "--model", model, "--data", text, "--seq-len", SEQ_LEN,
                 "--numerics", numerics, "--logits", file)
        data = load_file(file)
        ends = np.cumsum(data["windows"])[:-1]
        return list(zip(np.split(data["input_ids"], ends), np.split(data["logits"], ends)))

    def greedy(self, model, prompt):
        return self.run("generate", "--model", model, "--prompt", prompt, "--temperature", 0,
                        "--max-tokens", NEW_TOKENS).rstrip("\n")


class Transformers:
    name, modules, form, exact = "transformers", ("torch", "transformers"), "hf", True

    def __init__(self, path):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def logits(self, ids):
        with self.torch.no_grad():
            ids = self.torch.tensor(ids.astype(np.int64))[None]
            return self.model(input_ids=ids).logits[0].numpy()


class LlamaCpp:
    name, modules, form, exact = "llama.cpp", ("llama_cpp",), "gguf-q2_0", False

    def __init__(self, path):
        from llama_cpp import Llama

        self.model = Llama(str(path), n_ctx=SEQ_LEN, n_batch=SEQ_LEN, logits_all=True,
                           verbose=False)

    def logits(self, ids):
        self.model.reset()
        self.model.eval(ids.tolist())
        return np.array(self.model.scores[: len(ids)])


class Mlx:
    name, modules, form, exact = "mlx-lm", ("mlx", "mlx_lm"), "mlx", False

    def __init__(self, path):
        import mlx.core as mx
        from mlx_lm import load

        self.mx = mx
        self.model, _ = load(str(path))

    def logits(self, ids):
        logits = self.model(self.mx.array(ids.astype(np.int32))[None])
        return np.array(logits[0].astype(self.mx.float32))


def compare_texts(peer, tokenizer, prompts, ours):
    """How many texts agree, and the places where the others part with the gap there."""
    same, ties = 0, []
    for prompt, text in zip(prompts, ours):
        # On its own, for as one text the two may meet in one token.
        before = tokenizer.encode(prompt).ids
        start = len(before)
        ids = np.array(before + tokenizer.encode(text[len(prompt):]).ids)
        # The choice of each next token, given our text up to it: up to the first other
        # choice this is what the program would have written itself.
        logits = log_softmax(peer.logits(ids))[start - 1:-1]
        parts = np.flatnonzero(logits.argmax(-1) != ids[start:])
        if len(parts) == 0:
            same += 1
            continue
        row, token = logits[parts[0]], ids[start + parts[0]]
        best = int(row.argmax())
        gap = float(row[best] - row[token])
        ties.append((parts[0], gap, tokenizer.decode([best]), tokenizer.decode([token])))
    return same, ties


def compare_peer(peer_class, setun, args, native, exact, tokenizer, texts):
    """One line of the table and whether it holds."""
    suffix = ".gguf" if peer_class.form.startswith("gguf") else ""
    path = setun.convert(args.model, peer_class.name + suffix, peer_class.form)
    peer = peer_class(path)
    theirs = [(ids, peer.logits(ids)) for ids, _ in native]
    ours = exact if peer_class.exact else native
    found, expected = perplexity(theirs), perplexity(ours)
    pairs = list(zip(theirs, ours))
    largest = max(np.abs(logits).max() for _, logits in theirs)
    distance = max(np.abs(a - b).max() for (_, a), (_, b) in pairs) / largest
    same, ties = compare_texts(peer, tokenizer, *texts)
    holds = abs(found / expected - 1) <= MAX_PERPLEXITY
    holds &= all(gap <= NEAR_TIE for _, gap, _, _ in ties)
    if peer_class.exact:
        holds &= distance <= MAX_LOGITS
    print(f"{peer_class.name:14}{peer_class.form:12}{found:12.4f}{expected:12.4f}"
          f"{found / expected - 1:+11.3%}{distance:11.1e}  {same} of {len(texts[0])}"
          f"   {'holds' if holds else 'BROKEN'}")
    for position, gap, other, token in ties:
        print(f"{'':14}after {position} tokens {other!r} is {gap:.4f} nats ahead of {token!r}")
    return holds


def read_gguf(setun, model):
    """The gguf package reads every tensor, and has the values of the first matrix."""
    import gguf

    known = hasattr(gguf.GGMLQuantizationType, "Q2_0")
    form = "gguf-q2_0" if known else "gguf-bf16"
    path = setun.convert(model, "reader.gguf", form)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    count = len(json.loads(setun.run("inspect", path, "--json"))["files"][0]["tensors"])
    unpacked = setun.convert(model, "reader-f32", "hf-f32") / "model.safetensors"
    expected = load_file(unpacked)["model.embed_tokens.weight"]
    first = tensors["token_embd.weight"]
    values = gguf.quants.dequantize(first.data, first.tensor_type).reshape(expected.shape)
    same = bool((values == expected).all())
    note = "" if known else " (this version does not know Q2_0)"
    print(f"{'gguf':14}{form:12}reads {len(tensors)} of {count} tensors, "
          f"values {'equal' if same else 'DIFFER'}{note}")
    return same and len(tensors) == count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setun", required=True)
    parser.add_argument("--model", required=True, help="run, checkpoint or export")
    parser.add_argument("--text", required=True, type=Path, help="held-out text")
    args = parser.parse_args()
    installed = lambda name: importlib.util.find_spec(name) is not None
    if not installed("tokenizers"):
        sys.exit("install tokenizers: pip install tokenizers")
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as directory:
        setun = Setun(args.setun, Path(directory))
        text = args.text.read_text(encoding="utf-8")[:MAX_CHARS]
        sample = Path(directory) / "text.txt"
        sample.write_text(text, encoding="utf-8")
        native = setun.windows(args.model, sample, "int8")
        exact = setun.windows(args.model, sample, "f32")
        packed = setun.convert(args.model, "packed", "packed")
        tokenizer = Tokenizer.from_file(str(packed / "tokenizer.json"))
        step = len(text) // (NUM_PROMPTS + 1)
        prompts = [text[i * step:][:PROMPT_CHARS].rsplit(" ", 1)[0].strip()
                   for i in range(1, NUM_PROMPTS + 1)]
        texts = (prompts, [setun.greedy(args.model, prompt) for prompt in prompts])
        print(f"{sum(len(ids) for ids, _ in native)} tokens in windows of {SEQ_LEN}; perplexity "
              f"of Setun: int8 {perplexity(native):.4f}, f32 {perplexity(exact):.4f}")
        print(f"{'program':14}{'format':12}{'perplexity':>12}{'Setun':>12}{'difference':>11}"
              f"{'logits':>11}  greedy texts")
        results = []
        for peer in (Transformers, LlamaCpp, Mlx):
            if all(map(installed, peer.modules)):
                results.append(
                    compare_peer(peer, setun, args, native, exact, tokenizer, texts)
                )
            else:
                print(f"{peer.name:14}is not installed")
        if installed("gguf"):
            results.append(read_gguf(setun, args.model))
        else:
            print(f"{'gguf':14}is not installed")
    sys.exit(0 if results and all(results) else 1)


if __name__ == "__main__":
    main()
