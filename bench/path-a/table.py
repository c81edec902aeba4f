"""Prints the tables of the Path A study from its run directories: table.py OUTPUT"""

import json
import sys
from pathlib import Path


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def main(out):
    runs = {p.parent.name: p.parent for p in sorted(Path(out).glob("*/report.json"))}
    for title, chosen in (
        ("books", [name for name in runs if not name.startswith("encyclopedia")]),
        ("bundled corpus", [name for name in runs if name.startswith("encyclopedia")]),
    ):
        print(f"\n{title}\n{'run':26}{'tokens':>12}{'before':>9}{'best':>9}{'last':>9}"
              f"{'bits/byte':>11}   held-out nats by step")
        for name in chosen:
            all_lines = lines(runs[name])
            evals = [line for line in all_lines if line["kind"] == "eval"]
            settings = json.loads((runs[name] / "run.json").read_text())["settings"]["train"]
            last = evals[-1]
            tokens = last["step"] * settings["batch_size"] * settings["seq_len"]
            best = min(evals, key=lambda line: line["loss"])
            curve = " ".join(f"{e['step']}:{e['loss']:.3f}" for e in evals)
            print(f"{name:26}{tokens:12,}{evals[0]['loss']:9.4f}{best['loss']:9.4f}"
                  f"{last['loss']:9.4f}{last['bits_per_byte']:11.4f}   {curve}")
        for name in chosen:
            cost = json.loads((runs[name] / "run.json").read_text()).get("projection")
            if cost:
                print(f"{name}: before the projection {cost['before']:.4f}, after it "
                      f"{cost['after']:.4f}")


if __name__ == "__main__":
    main(sys.argv[1])
