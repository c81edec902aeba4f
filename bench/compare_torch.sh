#!/bin/bash
# Setun and PyTorch side by side on this machine: training steps of the path-b shape,
# attention, the norms with their errors against f64, softmax with top-k. Runs take turns, so
# that a change of the machine's mood hits both; the table shows medians. Nothing else should run.
#
#   bench/compare_torch.sh [train|attention|norms|topk|all]
#
# PYTHON   interpreter with torch, transformers and numpy; without them a virtual
#          environment is made in target/compare-torch   [python3]
# SETUN    the program                                   [target/release/setun]
# ROUNDS   turns                                         [3]
# STEPS    measured steps of a turn                      [5]
# THREADS  threads of both                               [all cores]
# MODES    comma separated PyTorch variants of a step    [bf16 and f32, eager and compiled]
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-all}
case $what in
    train | attention | norms | topk | all) ;;
    *) echo "usage: bench/compare_torch.sh [train|attention|norms|topk|all]" >&2 && exit 2 ;;
esac
python=${PYTHON:-python3}
setun=${SETUN:-target/release/setun}
IFS=, read -ra modes <<< "${MODES:-eager,compiled,eager f32,compiled f32}"
rounds=${ROUNDS:-3} steps=${STEPS:-5} threads=${THREADS:-$(nproc)}

if [ ! -x "$setun" ]; then
    echo "no program at $setun: cargo build --release -p setun, or name one in SETUN" >&2
    exit 1
fi
if ! "$python" -c 'import torch, transformers, numpy' 2>/dev/null; then
    "$python" -m venv target/compare-torch
    python=target/compare-torch/bin/python
    "$python" -m pip install --quiet torch transformers numpy
fi
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

# Each measurement leaves one JSON file; `table` reads them all.
count=0
keep() { count=$((count + 1)) && "$@" > "$results/$count.json"; }
ours() { keep "$setun" bench "$@" --threads "$threads" --repeat "$steps" --json; }
torch() { keep "$python" bench/compare_torch.py "$@" --threads "$threads" --steps "$steps"; }

for ((round = 1; round <= rounds; round++)); do
    echo "round $round of $rounds" >&2
    if [[ $what == train || $what == all ]]; then
        ours train --shape path-b
        for mode in "${modes[@]}"; do torch train --mode "$mode"; done
    fi
    if [[ $what == attention || $what == all ]]; then
        for seq in 1024 4096; do
            for width in 64 128; do
                ours attention --seq $seq --head-dim $width
                torch attention --seq $seq --head-dim $width
            done
        done
    fi
    if [[ $what == norms || $what == all ]]; then
        for width in 1024 4096; do
            ours layer-norm --width $width
            torch norms --width $width
        done
    fi
    if [[ $what == topk || $what == all ]]; then
        for batch in 1 64; do
            ours softmax-topk --batch $batch
            torch topk --rows $batch
        done
    fi
done
"$python" bench/compare_torch.py table "$results"/*.json
