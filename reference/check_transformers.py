"""Compares Setun's logits with those of transformers on an exported model.

    setun eval --model RUN/export/hf --data TEXT --numerics f32 --logits f32.safetensors
    setun eval --model RUN/export/hf --data TEXT --numerics int8 --logits int8.safetensors
    python reference/check_transformers.py RUN/export/hf f32.safetensors [int8.safetensors]

Needs torch, transformers and safetensors. Exit code 1 if the f32 logits differ by more
than 1e-4 relative to the largest one. The mean KL divergence of the int8 model from the
f32 one is printed.
"""

import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LIMIT = 1e-4


def windows(logits_file):
    data = load_file(logits_file)
    lengths = data["windows"].tolist()
    return data["input_ids"].split(lengths), data["logits"].split(lengths)


def main(model_dir, f32_file, int8_file=None):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert type(model).__name__ == "Qwen3ForCausalLM", type(model)
    inputs, ours = windows(f32_file)
    worst, largest = 0.0, 0.0
    with torch.no_grad():
        for ids, logits in zip(inputs, ours):
            theirs = model(input_ids=ids[None]).logits[0]
            worst = max(worst, (theirs - logits).abs().max().item())
            largest = max(largest, theirs.abs().max().item())
    relative = worst / largest
    count = sum(len(ids) for ids in inputs)
    print(f"transformers: {count} positions, vocabulary {len(tokenizer)}, "
          f"largest difference {relative:.2e} of the largest logit (limit {LIMIT:.0e})")
    if int8_file:
        _, rounded = windows(int8_file)
        reference = torch.log_softmax(torch.cat(ours).double(), -1)
        other = torch.log_softmax(torch.cat(rounded).double(), -1)
        kl = (reference.exp() * (reference - other)).sum(-1).mean().item()
        agree = (reference.argmax(-1) == other.argmax(-1)).double().mean().item()
        print(f"int8 against f32: mean KL {kl:.3e} nats, same best token {agree:.2%}")
    return 0 if relative < LIMIT else 1


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
