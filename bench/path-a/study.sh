#!/bin/bash
# The Path A study: a dense teacher, and ternary students made from it on a tenth of its
# tokens. LOG.md tells what came out. Hours on two cores; goes on where it was stopped.
#
#     bench/path-a/study.sh OUTPUT 'books/train*.txt' books/valid.txt
#
# SETUN names the program (default: target/release/setun), PYTHON the Python for the table,
# MODEL the recipe of the teacher (default: the one million parameters of model.toml),
# TEACHER_LR its learning rate (3e-3); FACTORS=no leaves out the comparison of settings.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$here/../.."
out="$1" train="$2" valid="$3"
setun="${SETUN:-$root/target/release/setun}"
model="${MODEL:-$here/model.toml}"
mkdir -p "$out"

TEACHER_STEPS=2400
STEPS=240         # a tenth of the teacher's
FACTOR_STEPS=120  # where settings are compared

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
        "$setun" train "$model" --run.name "$name" --run.output "$run" \
            --tokenizer.path "$out/tokenizer.json" --data.train "$from" --data.valid "$held_out" \
            --eval.batch_size 32 "$@" > "$out/$name.log" 2>&1
    fi
}

if [ ! -f "$out/train.tokens" ]; then
    # The bundled corpus is in the tokenizer's text, so that its table is fair to it.
    # shellcheck disable=SC2086
    "$setun" tokenizer train $train "$root/data/encyclopedia.txt" --vocab-size 2048 \
        --output "$out/tokenizer.json"
    # A fifth of the paragraphs is enough to compare students with each other.
    awk 'NR % 5 == 1' "$valid" > "$out/sample.txt"
    for part in valid sample; do
        from="$valid"
        if [ "$part" = sample ]; then from="$out/sample.txt"; fi
        "$setun" tokenize --tokenizer "$out/tokenizer.json" --output "$out/$part.tokens" "$from"
    done
    # shellcheck disable=SC2086
    "$setun" tokenize --tokenizer "$out/tokenizer.json" --output "$out/train.tokens" $train
fi
books=("$out/train.tokens" "$out/sample.tokens")

cell teacher "$out/train.tokens" "$out/valid.tokens" --train.steps "$TEACHER_STEPS" \
    --train.lr "${TEACHER_LR:-3e-3}" \
    --train.schedule cosine --train.min_lr_ratio 0.02 --train.warmup_steps 100 --eval.every 300
dense="$out/teacher/export/hf"

shared=(--train.warmup_steps 12 --run.seed 2 --train.weight_decay 0)
cosine=("${shared[@]}" --train.schedule cosine --train.min_lr_ratio 0.02)
full=("${cosine[@]}" --train.steps "$STEPS" --eval.every 40)
short=(--train.steps "$FACTOR_STEPS" --eval.every 40)
from=(--init "$dense")
student=(--init "$dense" --model.ternary true)
distilled=("${student[@]}" --distill.weight 0.9)
cell distilled "${books[@]}" "${full[@]}" "${distilled[@]}" --train.lr 2e-3
cell tuned "${books[@]}" "${full[@]}" "${student[@]}" --train.lr 2e-3
cell continued "${books[@]}" "${full[@]}" "${from[@]}" --train.lr 3e-4
cell scratch "${books[@]}" "${full[@]}" --model.ternary true --train.lr 3e-3

# The bundled corpus: 0.3 MB, a tenth held out. The dense model overfits after four times
# through it; the distilled student still gains after twenty.
small() {
    local name="$1"
    shift
    if [ -f "$out/$name/report.json" ]; then return; fi
    echo "== $name"
    rm -rf "${out:?}/$name"
    "$setun" train "$model" --run.name "$name" --run.output "$out/$name" \
        --tokenizer.path "$out/tokenizer.json" --data.train "$root/data/encyclopedia.txt" \
        --data.valid_fraction 0.1 --data.split_on blank-lines --eval.batch_size 32 \
        "${cosine[@]}" "$@" > "$out/$name.log" 2>&1
}
small encyclopedia-continued "${from[@]}" --train.lr 6e-4 --train.steps 80 --eval.every 20 \
    --train.warmup_steps 5 --train.weight_decay 0.1
soft=("${student[@]}" --distill.weight 0.9 --train.lr 2e-3 --eval.every 60
    --distill.teacher "$out/encyclopedia-continued/export/hf")
small encyclopedia-distilled "${soft[@]}" --train.steps "$STEPS"
small encyclopedia-distilled-longer "${soft[@]}" --train.steps $((2 * STEPS))
small encyclopedia-tuned "${student[@]}" --train.lr 2e-3 --train.steps "$STEPS" --eval.every 40
small encyclopedia-scratch --model.ternary true --train.lr 3e-3 --train.steps "$STEPS" \
    --eval.every 40

if [ "${FACTORS:-yes}" = yes ]; then
    factor=("${short[@]}" "${distilled[@]}")
    cell lr-2e-3 "${books[@]}" "${cosine[@]}" "${factor[@]}" --train.lr 2e-3
    cell lr-5e-4 "${books[@]}" "${cosine[@]}" "${factor[@]}" --train.lr 5e-4
    cell lr-1e-4 "${books[@]}" "${cosine[@]}" "${factor[@]}" --train.lr 1e-4
    cell gradual "${books[@]}" "${cosine[@]}" "${factor[@]}" --train.lr 2e-3 --train.blend_steps 40
    cell constant "${books[@]}" "${shared[@]}" "${factor[@]}" --train.lr 2e-3 \
        --train.schedule constant
    cell unclipped "${books[@]}" "${cosine[@]}" "${factor[@]}" --train.lr 2e-3 --train.grad_clip 0
fi

"${PYTHON:-python3}" "$here/table.py" "$out"
