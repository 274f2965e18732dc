"""Writes checkpoints for scripts/gpu-check, with nothing but the standard library.

`checkpoint.py every-dtype FOLDER`      a small one: every dtype, whole and cut, cast and transposed; with rules files
`checkpoint.py llama FOLDER BYTES SECONDS`  a Llama-shaped bf16 one of at most BYTES, as much as is written in SECONDS
"""

import json
import os
import struct
import sys
import time
from pathlib import Path

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}
CASTS = {"F32": ["f16", "bf16"], "F16": ["f32", "bf16"], "BF16": ["f32", "f16"]} | {
    name: ["f32", "f16", "bf16"] for name in ("F8_E4M3", "F8_E5M2")
}
BLOCK = 64 << 20


class Noise:
    """Random bytes that no file system can compress or share: one random block, turned and xored each time."""

    def __init__(self, block=BLOCK):
        self.block = os.urandom(block)
        self.turns = 0

    def next(self):
        self.turns += 1
        table = bytes(byte ^ (self.turns & 255) for byte in range(256))
        at = self.turns * 1_000_003 % len(self.block)
        return self.block[at:].translate(table) + self.block[:at].translate(table)

    def write(self, file, size):
        while size > 0:
            block = memoryview(self.next())[:size]
            file.write(block)
            size -= len(block)


def write_file(path, tensors, noise, misalign=False):
    """Writes tensors, (name, dtype, shape) each, with random bytes; `misalign` lets them start at an odd byte."""
    header, offset = {}, 0
    for name, dtype, shape in tensors:
        elements = 1
        for dim in shape:
            elements *= dim
        end = offset + elements * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8 + (5 if misalign else 0))
    with open(path, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        noise.write(file, offset)
        os.fsync(file.fileno())
    return offset


def every_dtype(folder):
    """Of every dtype a tensor that is whole, one cut by rows and one by columns; of those that can be cast or
    transposed these three for each way. One file's tensors start at odd bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    kept, changed = [], []
    for dtype in BITS:
        for cut, shape in [("whole", [37, 24]), ("rows", [64, 72]), ("columns", [72, 64])]:
            kept.append((f"{dtype}.{cut}", dtype, shape))
    # More than a slot of the staging ring.
    kept += [("BF16.large.rows", "BF16", [2048, 4096]), ("BF16.large.columns", "BF16", [4096, 2048])]
    for dtype, targets in CASTS.items():
        for target in targets:
            for cut in ("whole", "rows", "columns"):
                changed.append((f"{dtype}.to_{target}.{cut}", dtype, [72, 136]))
            changed.append((f"{dtype}.to_{target}.transposed.columns", dtype, [72, 136]))
    changed += [
        (f"{dtype}.transposed.{cut}", dtype, [136, 72])
        for dtype in ("F16", "BF16", "F32", "F64")
        for cut in ("whole", "rows", "columns")
    ]
    changed += [("BF16.to_f32.large.columns", "BF16", [1024, 4096]), ("F32.transposed.large.rows", "F32", [2048, 1024])]
    noise = Noise(1 << 20)
    write_file(folder / "kept.safetensors", kept, noise)
    write_file(folder / "changed.safetensors", changed, noise, misalign=True)
    files = {name: "kept.safetensors" for name, _, _ in kept} | {name: "changed.safetensors" for name, _, _ in changed}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

    rules = []
    for target in ("f32", "f16", "bf16"):
        cast = f'cast = "{target}"'
        rules.append((f"*.to_{target}.transposed.columns", f"shard = {{ dim = 1 }}, {cast}, transpose = true"))
        rules += [(f"*.to_{target}.{end}", f"{way}, {cast}") for end, way in CUTS]
    rules += [(f"*.transposed.{end}", f"{way}, transpose = true") for end, way in CUTS]
    # What is no float of 16 bits or more is neither cast nor transposed; packed elements are cut between bytes only.
    (folder / "changes.toml").write_text(rules_file(rules + CUTS))
    (folder / "cuts.toml").write_text(rules_file(CUTS))


CUTS = [("**.rows", "shard = { dim = 0 }"), ("**.columns", "shard = { dim = 1 }"), ("**", "replicate = true")]


def rules_file(rules):
    lines = [f"  {{ match = \"{pattern}\", {way}, optional = true }},\n" for pattern, way in rules]
    return "rule = [\n" + "".join(lines) + "]\n"


def llama(folder, most, seconds):
    """Files of whole layers until the next one would be too much of either bytes or time."""
    folder.mkdir(parents=True, exist_ok=True)
    # The shapes of Llama 3.1 8B; a small checkpoint gets small ones.
    hidden, kv, intermediate, vocabulary = (4096, 1024, 14336, 128256) if most >= 4 << 30 else (512, 128, 1792, 4096)
    layer_shapes = {
        "input_layernorm": [hidden], "self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [kv, hidden],
        "self_attn.v_proj": [kv, hidden], "self_attn.o_proj": [hidden, hidden], "post_attention_layernorm": [hidden],
        "mlp.gate_proj": [intermediate, hidden], "mlp.up_proj": [intermediate, hidden],
        "mlp.down_proj": [hidden, intermediate],
    }
    head = [("model.embed_tokens.weight", "BF16", [vocabulary, hidden]), ("model.norm.weight", "BF16", [hidden])]
    head.append(("lm_head.weight", "BF16", [vocabulary, hidden]))
    noise, start, files, total, layers = Noise(min(BLOCK, most // 4)), time.monotonic(), {}, 0, 0

    def add(tensors):
        name = f"model-{len(set(files.values())):05}.safetensors"
        files.update({tensor: name for tensor, _, _ in tensors})
        return write_file(folder / name, tensors, noise)

    total += add(head)
    while True:
        tensors = [
            (f"model.layers.{layer}.{name}.weight", "BF16", shape)
            for layer in range(layers, layers + 4)
            for name, shape in layer_shapes.items()
        ]
        size = add(tensors)
        total, layers = total + size, layers + 4
        elapsed = time.monotonic() - start
        if total + size > most or elapsed * (total + size) / total > seconds:
            break
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    heads = hidden // 128
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "head_dim": 128,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv // 128,
        "num_hidden_layers": layers, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config))
    seconds = time.monotonic() - start
    print(json.dumps({"bytes": total, "tensors": len(files), "layers": layers, "write_seconds": seconds}))


if __name__ == "__main__":
    if sys.argv[1] == "every-dtype":
        every_dtype(Path(sys.argv[2]))
    else:
        llama(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
