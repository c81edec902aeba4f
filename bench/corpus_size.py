"""A corpus of 1 MB and one of 1 GB: the same tokens/s, and memory that does not grow.

Texts are drawn at random from the words of the bundled encyclopedia. Both runs take the same
steps with the same tokenizer; most resident memory and seconds are those of the processes.

    cargo build --release
    python bench/corpus_size.py [--megabytes 1,1000] [--steps 30]
"""

import argparse
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETUN = ROOT / "target/release/setun"


def write_corpus(path, megabytes):
    """Documents of about 3 kB until the size is reached."""
    words = re.findall(r"\w+", (ROOT / "data/encyclopedia.txt").read_text(encoding="utf-8"))
    generator = random.Random(megabytes)
    left = megabytes * 1_000_000
    with open(path, "w", encoding="utf-8") as file:
        while left > 0:
            document = " ".join(generator.choices(words, k=500)) + ".\n\n"
            left -= file.write(document)


def measured(*arguments):
    """Seconds of a run of Setun, and its most resident memory in MiB."""
    start = time.monotonic()
    process = subprocess.Popen([SETUN, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"setun {arguments[0]} ended with status {status}")
    return time.monotonic() - start, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", default="1,1000")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--work", type=pathlib.Path, help="where the corpora are made")
    args = parser.parse_args()
    print("{:>8}{:>12}{:>14}{:>12}{:>14}".format("MB", "seconds", "tokens", "tokens/s", "resident MiB"))
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        work = pathlib.Path(work)
        tokenizer = work / "tokenizer.json"
        source = ROOT / "data/encyclopedia.txt"
        measured("tokenizer", "train", "--vocab-size", 2048, "--output", tokenizer, source)
        for megabytes in map(int, args.megabytes.split(",")):
            corpus, run = work / f"{megabytes}.txt", work / f"run-{megabytes}"
            write_corpus(corpus, megabytes)
            flags = {
                "data.train": corpus,
                "data.valid": source,
                "tokenizer.path": tokenizer,
                "run.output": run,
                "train.steps": args.steps,
                "train.warmup_steps": 4,
                "train.seq_len": 256,
                "eval.every": 0,
                "checkpoint.every": 0,
                "sample.prompts": 0,
                "export.formats": "",
            }
            seconds, resident = measured("train", *(f"--{k}={v}" for k, v in flags.items()))
            lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            rates = [line["tokens_per_second"] for line in lines if line["kind"] == "step"]
            tokens = json.loads((run / "run.json").read_text())["data"]["train_tokens"]
            row = (megabytes, f"{seconds:.0f}", tokens, f"{statistics.median(rates):.0f}", f"{resident:.0f}")
            print("{:>8}{:>12}{:>14}{:>12}{:>14}".format(*row), flush=True)


main()
