"""Checks a quick-start report: it must beat the interpolated bigram and verify."""

import json
import sys

report = json.load(open(sys.argv[1], encoding="utf-8"))
run = report["run"]
best = report["results"]["best_eval"]
problems = []
for baseline in run["baselines"]:
    lead = baseline["loss"] - best["loss"]
    print(f"{baseline['name']}: {baseline['loss']:.4f} nats, the model leads by {lead:+.4f}")
    if baseline["name"] in ("unigram", "interpolated bigram") and lead <= 0:
        problems.append(f"does not beat the {baseline['name']}")
print(f"best held-out loss {best['loss']:.4f} at step {best['step']}, "
      f"{best['bits_per_byte']:.4f} bits per byte")
if not all(check["pass"] for check in report["verification"]["checks"]):
    problems.append("a verification check failed")
if not all(row["pass"] for row in report["verification"]["rows"]):
    problems.append("a tensor is not ternary")
if len(run["samples"]) != 5:
    problems.append(f"{len(run['samples'])} samples instead of 5")
print("; ".join(problems) or "all as promised")
sys.exit(1 if problems else 0)
