#!/bin/bash
# The Path A study: a dense teacher, and ternary students made from it on a tenth of its
# tokens. LOG.md tells what came out. Hours on two cores; goes on where it was stopped.
#
#     bench/path-a/study.sh OUTPUT 'books/train*.txt' books/valid.txt
#
# SETUN names the program (default: target/release/setun), PYTHON the Python for the table.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$here/../.."
out="$1" train="$2" valid="$3"
setun="${SETUN:-$root/target/release/setun}"
mkdir -p "$out"

TEACHER_STEPS=2400
STEPS=240

# cell NAME TRAIN VALID FLAGS...: one run, made or finished if it is not there yet.
cell() {
    local run="$out/$1" from="$2" held_out="$3"
    local name="$1"
    shift 3
    if [ -f "$run/report.json" ]; then return; fi
    echo "== $name"
    if [ -n "$(ls "$run/checkpoints" 2> /dev/null)" ]; then
        "$setun" train --resume "$run" > "$out/$name.log" 2>&1
    else
        rm -rf "$run"
        "$setun" train "$here/model.toml" --run.name "$name" --run.output "$run" \
            --tokenizer.path "$out/tokenizer.json" --data.train "$from" --data.valid "$held_out" \
            --eval.batch_size 32 "$@" > "$out/$name.log" 2>&1
    fi
}

if [ ! -f "$out/train.tokens" ]; then
    # The bundled corpus is in the tokenizer's text, so that its table is fair to it.
    # shellcheck disable=SC2086
    "$setun" tokenizer train $train "$root/data/encyclopedia.txt" --vocab-size 2048 \
        --output "$out/tokenizer.json"
    "$setun" tokenize --tokenizer "$out/tokenizer.json" --output "$out/valid.tokens" "$valid"
    # shellcheck disable=SC2086
    "$setun" tokenize --tokenizer "$out/tokenizer.json" --output "$out/train.tokens" $train
fi
books=("$out/train.tokens" "$out/valid.tokens")

cell teacher "${books[@]}" --train.steps "$TEACHER_STEPS" --train.lr 3e-3 \
    --train.schedule cosine --train.min_lr_ratio 0.02 --train.warmup_steps 100 --eval.every 300
dense="$out/teacher/export/hf"

from=(--init "$dense" --train.steps "$STEPS" --train.warmup_steps 12 --run.seed 2
    --train.schedule cosine --train.min_lr_ratio 0.02 --train.weight_decay 0 --eval.every 60)
ternary=("${from[@]}" --model.ternary true)
distilled=("${ternary[@]}" --distill.weight 0.9)
cell distilled "${books[@]}" "${distilled[@]}" --train.lr 2e-3
cell tuned "${books[@]}" "${ternary[@]}" --train.lr 2e-3
cell continued "${books[@]}" "${from[@]}" --train.lr 3e-4
cell distilled-5e-4 "${books[@]}" "${distilled[@]}" --train.lr 5e-4
cell distilled-1e-4 "${books[@]}" "${distilled[@]}" --train.lr 1e-4
cell distilled-gradual "${books[@]}" "${distilled[@]}" --train.lr 2e-3 --train.blend_steps 80
cell scratch "${books[@]}" "${ternary[@]}" --init "" --train.lr 3e-3
cell distilled-constant "${books[@]}" "${distilled[@]}" --train.lr 2e-3 \
    --train.schedule constant
cell distilled-unclipped "${books[@]}" "${distilled[@]}" --train.lr 2e-3 --train.grad_clip 0

# The bundled corpus: 0.3 MB, a tenth held out; every student sees it about eight times.
if [ ! -f "$out/encyclopedia.txt" ]; then cp "$root/data/encyclopedia.txt" "$out/"; fi
small() {
    local name="$1"
    shift
    if [ -f "$out/$name/report.json" ]; then return; fi
    echo "== $name"
    rm -rf "${out:?}/$name"
    "$setun" train "$here/model.toml" --run.name "$name" --run.output "$out/$name" \
        --tokenizer.path "$out/tokenizer.json" --data.train "$out/encyclopedia.txt" \
        --data.valid_fraction 0.1 --data.split_on blank-lines --eval.batch_size 32 \
        --eval.every 30 "$@" > "$out/$name.log" 2>&1
}
small encyclopedia-continued "${from[@]}" --train.lr 1e-3
small encyclopedia-tuned "${ternary[@]}" --train.lr 2e-3
small encyclopedia-distilled "${distilled[@]}" --train.lr 2e-3 \
    --distill.teacher "$out/encyclopedia-continued/export/hf"
small encyclopedia-scratch "${ternary[@]}" --init "" --train.lr 3e-3

"${PYTHON:-python3}" "$here/table.py" "$out"
