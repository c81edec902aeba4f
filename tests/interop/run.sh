#!/bin/bash
# Runs a model of Setun's in the programs that read its files, with whatever of them is
# installed, and prints a table. See compare.py for what is compared.
#
#     tests/interop/run.sh [RUN [HELD_OUT.txt]]
#
# Without a RUN, the tiny recipe is trained for it. PYTHON names the Python to use.
# To install everything (the second line builds llama.cpp, which takes a while):
#
#     pip install numpy safetensors tokenizers torch transformers gguf 'mlx[cpu]' mlx-lm
#     pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
(cd "$root" && cargo build --release --quiet)
setun="${CARGO_TARGET_DIR:-$root/target}/release/setun"

model="${1:-}"
text="${2:-}"
if [ -z "$model" ]; then
    model="$work/run"
    # Sizes that the blocks of every format divide.
    "$setun" train "$root/recipes/tiny.toml" --run.output "$model" --train.steps 60 \
        --model.hidden_size 128 --model.intermediate_size 256 --model.head_dim 64 \
        --model.group_size 128 --model.max_position_embeddings 512 > "$work/train.txt" 2>&1 \
        || { cat "$work/train.txt" >&2; exit 1; }
fi
if [ -z "$text" ]; then
    text="$work/text.txt"
    head -c 20000 "$root/data/encyclopedia.txt" > "$text"
fi
"$python" "$root/tests/interop/compare.py" --setun "$setun" --model "$model" --text "$text"
