#!/bin/bash
# Tokenizer and token files of the recipe study, in runs/recipe/data.
#
#     bench/recipe/prepare.sh books/train.txt books/valid.txt
#
# SETUN names the program (default: target/release/setun).
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
train="$1" valid="$2"
setun="${SETUN:-$root/target/release/setun}"
out="$root/runs/recipe/data"
mkdir -p "$out"

# tokenizer NAME SIZE: a tokenizer of the training text, unless it is there.
tokenizer() {
    if [ -f "$out/$1.json" ]; then return; fi
    "$setun" tokenizer train "$train" --vocab-size "$2" --output "$out/$1.json"
}

# tokens NAME TEXT [TOKENIZER]: one token file, unless it is there.
tokens() {
    if [ -f "$out/$1.tokens" ]; then return; fi
    "$setun" tokenize --tokenizer "$out/${3:-tokenizer}.json" --output "$out/$1.tokens" "$2"
}

tokenizer tokenizer 4096
tokenizer path-b 8192

# A fifth of the held-out paragraphs is enough to compare runs with each other; the rest
# would take longer to read than to train on.
awk 'NR % 5 == 1' "$valid" > "$out/sample.txt"
# 1.3 M tokens are about 5 MB of text; a quarter and a sixteenth of that, cut between lines.
head -c 1300000 "$train" | sed '$d' > "$out/quarter.txt"
head -c 325000 "$train" | sed '$d' > "$out/sixteenth.txt"
tokens train "$train"
tokens valid "$valid"
tokens sample "$out/sample.txt"
tokens quarter "$out/quarter.txt"
tokens sixteenth "$out/sixteenth.txt"
# For confirm.toml.
tokens path-b-train "$train" path-b
tokens path-b-sample "$out/sample.txt" path-b
