#!/usr/bin/env python3
"""Independent proof that a model file is ternary: no code of Setun's, no torch.

    check_ternary.py PATH [PATH...]

PATH is a packed file (or a directory with packed.safetensors), a Hugging Face directory
(model.safetensors or shards) or a checkpoint directory (latents.safetensors with
packed.safetensors; its packed weights must be the projection of its latents).

Prints a table of every 2-D weight. Exits with 0 if every one of them is in {-s, 0, +s}
by groups, 1 if one is not (the first offending weight of each tensor is named), and 2
if a path cannot be read. Needs Python 3.9 and numpy.
"""

import json
import math
import os
import sys

import numpy as np

TOLERANCE = 1e-5  # distance of w / s from {-1, 0, +1}
GROUP_SIZES = (256, 128, 64, 32)  # tried where a file records none
MIN_GROUP_SIZE = 8  # smaller groups prove nothing: nearly every weight has its own scale
MIN_SCALE = 2.0**-17
MAX_SCALE = 65504.0
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}


class Unreadable(Exception):
    """A file that is cut off, damaged or not what it should be."""


class TensorFile:
    """A safetensors file, read with nothing but the format's definition."""

    def __init__(self, path):
        self.path = path
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise Unreadable(f"{path}: cut off in its header")
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise Unreadable(f"{path}: bad header: {error}") from None
        self.metadata = header.pop("__metadata__", {})
        self.start = 8 + length
        self.infos = header
        end = 0
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = info["data_offsets"]
            item = ITEM_BYTES.get(info["dtype"])
            if first != end or item is None or last - first != item * math.prod(info["shape"]):
                raise Unreadable(f"{path}: tensor {name} has a bad dtype, size or place")
            end = last
        if self.start + end != size:
            raise Unreadable(f"{path}: {size} bytes, its header asks for {self.start + end}")

    def shape(self, name):
        return tuple(self.infos[name]["shape"])

    def dtype(self, name):
        return self.infos[name]["dtype"]

    def read(self, name):
        """The tensor: floats as float32 (exact for all three dtypes), U8 as uint8."""
        first, last = self.infos[name]["data_offsets"]
        with open(self.path, "rb") as file:
            file.seek(self.start + first)
            raw = file.read(last - first)
        dtype = self.dtype(name)
        if dtype == "BF16":
            # A bf16 is the upper half of a float32.
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif dtype == "U8":
            values = np.frombuffer(raw, np.uint8)
        else:
            values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
        return values.reshape(self.shape(name))


def round_to_bf16(x):
    """Rounds float64 to 8 significant bits, half to even (enough for normal scales)."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.rint(mantissa * 256.0), exponent - 8)


def parameters(config):
    """Every parameter that config.json implies, as (name, shape), in order."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q = config["num_attention_heads"] * head_dim
    kv = config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.q_norm": (head_dim,),
            "self_attn.k_norm": (head_dim,),
            "self_attn.o_proj": (hidden, q),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", (config["vocab_size"], hidden)


class Report:
    """Collects table rows and failures of one path."""

    def __init__(self):
        self.rows = []
        self.failures = []
        self.num_norms = self.num_norm_weights = 0

    def fail(self, message):
        self.failures.append(message)

    def norm(self, name, values):
        self.num_norms += 1
        self.num_norm_weights += values.size
        if not np.isfinite(values).all():
            index = int(np.argmin(np.isfinite(values)))
            self.fail(f"{name} element {index} is {values.flat[index]}")

    def matrix(self, name, trits, scales, worst):
        share = [float(np.mean(trits == t)) for t in (-1, 0, 1)]
        self.rows.append((name, trits.shape, scales, share, worst))

    def print(self, title):
        print(title)
        width = max([len(row[0]) for row in self.rows] + [6])
        print(
            f"{'tensor':<{width}}  {'shape':>15}  {'groups':>9}  {'-1':>8}  {'0':>8}  {'+1':>8}"
            f"  {'scale min':>10}  {'scale max':>10}  {'worst':>10}"
        )
        for name, (out, cols), scales, share, worst in self.rows:
            shares = "  ".join(f"{100 * s:6.2f} %" for s in share)
            print(
                f"{name:<{width}}  {f'{out} x {cols}':>15}  {scales.size:>9}  {shares}"
                f"  {scales.min():>10.3e}  {scales.max():>10.3e}  {worst:>10.3e}"
            )
        total = sum(out * cols for _, (out, cols), *_ in self.rows)
        print(f"{len(self.rows)} matrices, {total} weights; {self.num_norms} norms,", end=" ")
        print(f"{self.num_norm_weights} weights in float")
        for failure in self.failures:
            print(f"FAILED: {failure}")
        print(f"{title}: {'NOT ternary' if self.failures else 'ternary'}\n")


def grouped(values, group_size, fill=0):
    """[rows, cols] as [rows, groups, group_size]; a short last group is filled up."""
    rows, cols = values.shape
    groups = -(-cols // group_size)
    padded = np.full((rows, groups * group_size), fill, values.dtype)
    padded[:, :cols] = values
    return padded.reshape(rows, groups, group_size)


def distances(values, group_size):
    """Scale of each group (its largest magnitude) and each weight's |w/s| from {0, 1}."""
    groups = np.abs(grouped(values, group_size))
    scales = groups.max(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = groups / scales[:, :, None]
        distance = np.minimum(ratio, np.abs(1 - ratio))
    distance[np.broadcast_to((scales == 0)[:, :, None], distance.shape)] = 0
    # NaN and infinity have no distance: as far away as can be.
    distance[~np.isfinite(distance)] = np.inf
    return scales, distance


def check_values(report, name, values, group_size, strict):
    """A float tensor: is each group in {-s, 0, +s}?"""
    rows, cols = values.shape
    scales, distance = distances(values, group_size)
    bad = np.argwhere(distance.max(axis=2) > TOLERANCE)
    if bad.size:
        row, group = (int(i) for i in bad[0])
        members = values[row, group * group_size : (group + 1) * group_size]
        column = group * group_size + odd_one_out(members)
        report.fail(
            f"{name} row {row} column {column}: {values[row, column]} is not ternary"
            f" (group {group}, scale {scales[row, group]})"
        )
    else:
        check_scales(report, name, scales, strict)
    trits = np.zeros((rows, cols), np.int8)
    limit = np.repeat(scales, group_size, axis=1)[:, :cols] / 2
    trits[values > limit], trits[values < -limit] = 1, -1
    report.matrix(name, trits, scales, float(distance.max()))


def odd_one_out(members):
    """Index of the first weight that is neither 0 nor of the most frequent magnitude."""
    finite = np.isfinite(members)
    if not finite.all():
        return int(np.argmin(finite))
    magnitudes, counts = np.unique(np.abs(members[members != 0]), return_counts=True)
    # The last of equals, the largest, is taken for the scale.
    frequent = magnitudes[len(counts) - 1 - np.argmax(counts[::-1])]
    return int(np.argmax((members != 0) & (np.abs(members) != frequent)))


def check_scales(report, name, scales, strict):
    """Finite, not negative, at most 65504 and, with `strict`, exact in bf16."""
    with np.errstate(invalid="ignore"):
        bad = ~np.isfinite(scales) | np.signbit(scales) | (scales > MAX_SCALE)
        if strict:
            bad |= round_to_bf16(scales) != scales
    if bad.any():
        row, group = (int(i) for i in np.argwhere(bad)[0])
        report.fail(f"{name} row {row} group {group}: bad scale {scales[row, group]}")


def infer_group_size(matrices):
    """The group size with the fewest groups that are not ternary, the largest of those."""
    num_bad = dict.fromkeys(GROUP_SIZES, 0)
    for file, name in matrices:
        values = file.read(name)
        for size in GROUP_SIZES:
            _, distance = distances(values, size)
            num_bad[size] += int((distance.max(axis=2) > TOLERANCE).sum())
    return min(GROUP_SIZES, key=lambda size: (num_bad[size], -size))


def unpack(report, file, name, shape, group_size):
    """Trits and scales of a packed matrix."""
    rows, cols = shape
    groups, stride = -(-cols // group_size), -(-group_size // 4)
    trits_name, scales_name = f"{name}.trits", f"{name}.scales"
    expected = ((trits_name, "U8", groups * stride), (scales_name, "F16", groups))
    for tensor, dtype, width in expected:
        found = tensor in file.infos and (file.dtype(tensor), file.shape(tensor))
        if found != (dtype, (rows, width)):
            raise Unreadable(f"{file.path}: {tensor} should be {dtype} {(rows, width)}: {found}")
    packed = file.read(trits_name).reshape(rows, groups, stride, 1)
    codes = (packed >> np.array([0, 2, 4, 6], np.uint8)) & 3
    codes = codes.reshape(rows, groups, stride * 4)
    # The place of each code in its row; codes behind the end of a group are padding.
    column = np.arange(groups)[:, None] * group_size + np.arange(stride * 4)
    used = (np.arange(stride * 4) < group_size) & (column < cols)
    if (codes[:, ~used] != 0).any():
        report.fail(f"{name}: padding bits are not zero")
    trits = codes[:, used]
    if (trits == 3).any():
        row, col = (int(i) for i in np.argwhere(trits == 3)[0])
        report.fail(f"{name} row {row} column {col}: code 3 is no trit")
    scales = file.read(scales_name)
    check_scales(report, name, scales, strict=True)
    return trits.astype(np.int8) - 1, scales


def project(latents, group_size, rule):
    """Trits and scales of latents: `(trits, lowest scale, highest scale)`.

    Two scales, because the order of a float64 sum may decide a rounding."""
    rows, cols = latents.shape
    magnitude = grouped(np.abs(latents).astype(np.float64), group_size)
    count = grouped(np.ones((1, cols)), group_size).sum(axis=2)
    mean = magnitude.sum(axis=2) / count
    limit = None
    if rule == "max":
        exact = magnitude.max(axis=2)
    elif rule == "mean-nonzero":
        limit = (0.5 * mean).astype(np.float32)
        kept = magnitude > limit[:, :, None]
        exact = (magnitude * kept).sum(axis=2) / np.maximum(kept.sum(axis=2), 1)
    elif rule == "least-squares":
        sums = np.cumsum(-np.sort(-magnitude, axis=2), axis=2)
        numbers = np.arange(1, group_size + 1)
        best = (sums * sums / numbers).argmax(axis=2)[:, :, None]
        exact = (np.take_along_axis(sums, best, axis=2) / (best + 1))[:, :, 0]
    else:
        exact = mean
    low, high = (round_to_bf16(exact * (1 + e)) for e in (-1e-13, 1e-13))
    low, high = (np.where(s < MIN_SCALE, 0.0, s) for s in (low, high))
    limit = high / 2 if limit is None else limit
    keep = (magnitude > limit[:, :, None]) & (high > 0)[:, :, None]
    keep = keep.reshape(rows, -1)[:, :cols]
    return np.where(keep, np.sign(latents), 0).astype(np.int8), low, high


def check_projection(report, name, latents, trits, scales, group_size, rule):
    """The packed matrix must be what the latents project to."""
    expected, low, high = project(latents, group_size, rule)
    wrong = (scales != low) & (scales != high)
    if wrong.any():
        row, group = (int(i) for i in np.argwhere(wrong)[0])
        report.fail(
            f"{name} row {row} group {group}: scale {scales[row, group]},"
            f" but the latents give {high[row, group]}"
        )
    elif (trits != expected).any():
        row, col = (int(i) for i in np.argwhere(trits != expected)[0])
        report.fail(
            f"{name} row {row} column {col}: trit {trits[row, col]}, but the latent"
            f" {latents[row, col]} gives {expected[row, col]}"
        )


def check_packed(path, latents_path=None):
    """A packed file; with `latents_path`, also that it is the projection of the latents."""
    file = TensorFile(path)
    if file.metadata.get("format") != "setun-packed":
        raise Unreadable(f"{path}: not a packed model")
    report = Report()
    group_size, rule = int(file.metadata["group_size"]), file.metadata["scale_rule"]
    check_group_size(report, group_size)
    latents = TensorFile(latents_path) if latents_path else None
    known = set()
    for name, shape in parameters(json.loads(file.metadata["config"])):
        if latents and (name not in latents.infos or latents.shape(name) != shape):
            raise Unreadable(f"{latents_path}: {name} should have shape {shape}")
        if len(shape) == 1:
            known.add(name)
            if name not in file.infos or file.shape(name) != shape:
                raise Unreadable(f"{path}: {name} should have shape {shape}")
            values = file.read(name)
            report.norm(name, values)
            if latents and not np.array_equal(values, latents.read(name)):
                report.fail(f"{name}: not the norm weights of the latents")
            continue
        known |= {f"{name}.trits", f"{name}.scales"}
        trits, scales = unpack(report, file, name, shape, group_size)
        if latents:
            check_projection(report, name, latents.read(name), trits, scales, group_size, rule)
        report.matrix(name, trits, scales, 0.0)
    for name in sorted(set(file.infos) - known):
        report.fail(f"{name} is no part of this model")
    return report


def check_huggingface(directory):
    """Every 2-D weight of model.safetensors or its shards, embedding and head included."""
    files = [TensorFile(path) for path in huggingface_files(directory)]
    where = {name: file for file in files for name in file.infos}
    report = Report()
    expected = dict(parameters(json.loads(read_text(os.path.join(directory, "config.json")))))
    for name, shape in expected.items():
        if name not in where or where[name].shape(name) != shape:
            report.fail(f"{name} should be there with shape {shape}")
    names = [name for name in expected if name in where] + sorted(set(where) - set(expected))
    matrices = [(where[name], name) for name in names if len(where[name].shape(name)) == 2]
    recorded = [file.metadata.get("setun.group_size") for file in files]
    recorded = [size for size in recorded if size is not None]
    if recorded:
        group_size = int(recorded[0])
    else:
        group_size = infer_group_size(matrices)
        print(f"{directory}: no group size recorded, {group_size} fits best")
    check_group_size(report, group_size)
    for file, name in matrices:
        check_values(report, name, file.read(name), group_size, strict=bool(recorded))
    for name in names:
        if len(where[name].shape(name)) == 1:
            report.norm(name, where[name].read(name))
        elif len(where[name].shape(name)) != 2:
            report.fail(f"{name} has shape {where[name].shape(name)}, expected a matrix or a norm")
    return report


def check_group_size(report, group_size):
    if group_size < MIN_GROUP_SIZE:
        report.fail(f"group size {group_size} proves nothing")


def huggingface_files(directory):
    single = os.path.join(directory, "model.safetensors")
    if os.path.isfile(single):
        return [single]
    index = json.loads(read_text(single + ".index.json"))
    return [os.path.join(directory, name) for name in sorted(set(index["weight_map"].values()))]


def read_text(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def check(path):
    """Checks whatever lies at `path`."""
    if os.path.isfile(path):
        return check_packed(path)
    packed, latents = (os.path.join(path, f"{n}.safetensors") for n in ("packed", "latents"))
    if os.path.isfile(latents):
        if not os.path.isfile(packed):
            raise Unreadable(f"{path}: not a ternary model: no packed.safetensors")
        return check_packed(packed, latents)
    if os.path.isfile(packed):
        return check_packed(packed)
    return check_huggingface(path)


def main(paths):
    if not paths:
        print(__doc__.strip())
        return 2
    status = 0
    for path in paths:
        try:
            report = check(path)
        except Unreadable as error:
            print(f"UNREADABLE: {error}\n")
            status = 2
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            # A field of the config or the metadata is missing or of another type.
            print(f"UNREADABLE: {path}: {type(error).__name__}: {error}\n")
            status = 2
            continue
        report.print(path)
        if report.failures or not report.rows:
            status = max(status, 1)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
