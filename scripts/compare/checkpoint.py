"""Writes checkpoints for scripts/gpu-check and scripts/compare/run, with nothing but the standard library. For the former:

`checkpoint.py every-dtype FOLDER`      a small one: every dtype, whole and cut, cast and transposed; with rules files
`checkpoint.py llama FOLDER BYTES SECONDS`  a Llama-shaped bf16 one of at most BYTES, as much as is written in SECONDS
"""

import hashlib
import json
import math
import os
import struct
import sys
import time
from pathlib import Path
from typing import NamedTuple

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


class Llama(NamedTuple):
    """The shapes of a model of the Llama family."""

    hidden: int
    kv: int
    intermediate: int
    vocabulary: int
    head: int = 128
    tied: bool = False

    def ends(self):
        """What belongs to no layer."""
        tensors = [("model.embed_tokens.weight", [self.vocabulary, self.hidden]), ("model.norm.weight", [self.hidden])]
        return tensors if self.tied else [*tensors, ("lm_head.weight", [self.vocabulary, self.hidden])]

    def layer(self, number):
        hidden, kv, intermediate = self.hidden, self.kv, self.intermediate
        shapes = {
            "input_layernorm": [hidden], "self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [kv, hidden],
            "self_attn.v_proj": [kv, hidden], "self_attn.o_proj": [hidden, hidden], "post_attention_layernorm": [hidden],
            "mlp.gate_proj": [intermediate, hidden], "mlp.up_proj": [intermediate, hidden],
            "mlp.down_proj": [hidden, intermediate],
        }
        return [(f"model.layers.{number}.{name}.weight", shape) for name, shape in shapes.items()]

    def config(self, layers):
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "head_dim": self.head, "intermediate_size": self.intermediate,
            "num_attention_heads": self.hidden // self.head, "num_key_value_heads": self.kv // self.head,
            "num_hidden_layers": layers, "tie_word_embeddings": self.tied, "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
        }


LLAMA_3_1_8B = Llama(4096, 1024, 14336, 128256)
LLAMA_3_2_1B = Llama(2048, 512, 8192, 128256, head=64, tied=True)
SMALL_LLAMA = Llama(512, 128, 1792, 4096)
# Enough heads for 8 ranks.
SMALL_LLAMA_OF_8 = Llama(1024, 512, 3072, 16384, head=64, tied=True)
# As engines cut its layers over tensor-parallel ranks: these dimensions, and nothing else.
LLAMA_CUTS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0, "o_proj": 1, "down_proj": 1}


class Writer:
    """Writes the files of a model, then what belongs beside them."""

    def __init__(self, folder, block):
        self.folder, self.noise, self.files, self.total = folder, Noise(block), {}, 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, tensors, dtype="BF16"):
        """One more file, of tensors (name, shape)."""
        name = f"model-{len(set(self.files.values())):05}.safetensors"
        self.files.update({tensor: name for tensor, _ in tensors})
        written = [(tensor, dtype, shape) for tensor, shape in tensors]
        size = write_file(self.folder / name, written, self.noise)
        self.total += size
        return size

    def finish(self, config):
        index = {"metadata": {"total_size": self.total}, "weight_map": self.files}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (self.folder / "config.json").write_text(json.dumps(config))


def llama(folder, most, seconds):
    """Files of whole layers until the next one would be too much of either bytes or time."""
    shapes = LLAMA_3_1_8B if most >= 4 << 30 else SMALL_LLAMA
    writer, start, layers = Writer(folder, min(BLOCK, most // 4)), time.monotonic(), 0
    writer.add(shapes.ends())
    while True:
        size = writer.add([tensor for layer in range(layers, layers + 4) for tensor in shapes.layer(layer)])
        layers += 4
        elapsed = time.monotonic() - start
        if writer.total + size > most or elapsed * (writer.total + size) / writer.total > seconds:
            break
    writer.finish(shapes.config(layers))
    seconds = time.monotonic() - start
    print(json.dumps(
        {"bytes": writer.total, "tensors": len(writer.files), "layers": layers, "write_seconds": seconds}
    ))


def llama_of_size(folder, most, shapes, shards):
    """So many files with as many layers as there is room for, one at least. What was written, and how it is cut."""
    bytes_of = lambda tensors: sum(2 * math.prod(shape) for _, shape in tensors)
    layers = max(1, (most - bytes_of(shapes.ends())) // bytes_of(shapes.layer(0)))
    writer = Writer(folder, min(BLOCK, most // 4))
    for shard in range(shards):
        first, end = shard * layers // shards, (shard + 1) * layers // shards
        tensors = [tensor for layer in range(first, end) for tensor in shapes.layer(layer)]
        tensors = shapes.ends() + tensors if shard == 0 else tensors
        if tensors:
            writer.add(tensors)
    writer.finish(shapes.config(layers))
    cuts = {name: LLAMA_CUTS[part] for name in writer.files if (part := name.split(".")[-2]) in LLAMA_CUTS}
    return {"bytes": writer.total, "tensors": len(writer.files), "layers": layers, "cuts": cuts}


def gpt2(path, layers):
    """The tensors of GPT-2 as they were published, float32, with the masks that are stored beside the weights."""
    hidden, positions = 768, 1024
    tensors = [("wte.weight", [50257, hidden]), ("wpe.weight", [positions, hidden])]
    norms = {"ln_1": [hidden], "ln_2": [hidden]}
    linear = {
        "attn.c_attn": [hidden, 3 * hidden], "attn.c_proj": [hidden, hidden], "mlp.c_fc": [hidden, 4 * hidden],
        "mlp.c_proj": [4 * hidden, hidden],
    }
    for layer in range(layers):
        tensors.append((f"h.{layer}.attn.bias", [1, 1, positions, positions]))
        for name, shape in {**norms, **linear}.items():
            tensors += [(f"h.{layer}.{name}.weight", shape), (f"h.{layer}.{name}.bias", shape[-1:])]
    tensors += [("ln_f.weight", [hidden]), ("ln_f.bias", [hidden])]
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [(name, "F32", shape) for name, shape in tensors]
    return {"bytes": write_file(path, written, Noise()), "tensors": len(tensors)}


def read_header(path):
    """The tensors of a file by name, as its header has them, and where the first one starts."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def join(paths, joined):
    """Copies the tensors of several files into one."""
    header, end, parts = {}, 0, []
    for path in paths:
        tensors, start = read_header(path)
        for name, tensor in tensors.items():
            header[name] = {**tensor, "data_offsets": [end + offset for offset in tensor["data_offsets"]]}
        parts.append((path, start))
        end += os.path.getsize(path) - start
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(joined, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for path, start in parts:
            with open(path, "rb", buffering=0) as part:
                part.seek(start)
                while block := part.read(BLOCK):
                    file.write(block)
        os.fsync(file.fileno())


def digests(paths, cuts, world, ranks):
    """What a rank must hold, taken from the files in the plainest way: for each rank the SHA-256 of the lines
    `name [shape] digest` of its tensors, sorted; digests are SHA-256 too."""
    lines = {rank: [] for rank in ranks}
    for path in paths:
        tensors, start = read_header(path)
        with open(path, "rb") as file:
            for name, tensor in tensors.items():
                shape, (begin, end) = tensor["shape"], tensor["data_offsets"]
                file.seek(start + begin)
                data = memoryview(file.read(end - begin))
                for rank in ranks:
                    cut, part = part_of(data, shape, cuts.get(name), world, rank)
                    digest = hashlib.sha256()
                    for piece in part:
                        digest.update(piece)
                    lines[rank].append(f"{name} [{','.join(map(str, cut))}] {digest.hexdigest()}\n")
    return {rank: hashlib.sha256("".join(sorted(those)).encode()).hexdigest() for rank, those in lines.items()}


def part_of(data, shape, dim, world, rank):
    """The shape and the bytes, in pieces, of a rank's part of a tensor; rows are equally long pieces."""
    if dim is None or world == 1:
        return shape, [data]
    cut = [size // world if axis == dim else size for axis, size in enumerate(shape)]
    rows = shape[0] if dim else 1
    length = len(data) // rows
    begin, end = length * rank // world, length * (rank + 1) // world
    return cut, (data[row * length + begin : row * length + end] for row in range(rows))


if __name__ == "__main__":
    if sys.argv[1] == "every-dtype":
        every_dtype(Path(sys.argv[2]))
    else:
        llama(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
