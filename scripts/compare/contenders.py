"""Who is measured by scripts/compare/run, and at what."""

from typing import NamedTuple


class Contender(NamedTuple):
    """A way to load. `loader` is what its program calls it, `files` which form of the weights it reads."""

    name: str
    loader: str
    program: str = "python"
    files: str = "safetensors"
    # Whose memory the tensors are afterwards: "own", or "lent" by a mapping of the file.
    memory: str = "own"
    note: str = ""


OURS = "shardlift"
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(OURS, "shardlift", "shardlift"),
        Contender("shardlift, mapped", "shardlift_mapped", "shardlift", memory="lent", note="`Residency::Mapped`"),
        Contender("torch.load", "torch_load", files="pickle", note="`weights_only=True`"),
        Contender("torch.load, mmap", "torch_load_mmap", files="pickle", memory="lent", note="`mmap=True`"),
        Contender("safetensors", "safetensors_mapped", memory="lent", note="`load_file`, which maps; parts by `get_slice`"),
        Contender("safetensors, copied", "safetensors_copied", note="`load_file`, then a copy of every tensor"),
        Contender("safetensors, pread", "safetensors_pread", note='`backend="pread"`; parts by `get_slice`'),
        Contender("fastsafetensors", "fastsafetensors", note="through the page cache (`FASTSAFETENSORS_ODIRECT=0`)"),
        Contender("fastsafetensors, O_DIRECT", "fastsafetensors_direct", note="its default on local file systems"),
        Contender("Run:ai streamer", "runai_streamer", note="`SafetensorsStreamer`, its defaults"),
        Contender("tensorizer", "tensorizer", files="tensors", note="`TensorDeserializer`, its own format"),
        Contender("candle", "candle", "candle", note="`MmapedSafetensors`; parts by `ShardedSafeTensors`"),
    )
}
# Where each of several ranks gets a part, everybody's parts are memory of their own.
CUTTERS = [
    OURS, "torch.load", "torch.load, mmap", "safetensors", "safetensors, pread", "fastsafetensors", "Run:ai streamer",
    "tensorizer", "candle",
]


class Row(NamedTuple):
    """One kind of load, measured in `columns`: (state of the page cache, malloc)."""

    title: str
    who: list
    columns: list
    model: str = "llama"
    world: int = 1
    ranks: tuple = (0,)
    first: bool = False
    touch: bool = True
    one_file: bool = False


PLAIN, HUGE = "plain", "huge pages"
WARM, HUGE_WARM, COLD = ("warm", PLAIN), ("warm", HUGE), ("cold", PLAIN)
# What tells glibc and torch to ask for huge pages. Ours asks by itself; it is measured with this too, to be compared.
HUGE_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}
EVERYWHERE = [WARM, HUGE_WARM, COLD]
GPT2 = ["torch.load", "safetensors", "shardlift, mapped", OURS]

ROWS = {
    "whole": Row("Whole load", list(CONTENDERS), EVERYWHERE),
    "one-file": Row(
        "Whole load, all tensors in one file",
        [OURS, "safetensors, copied", "safetensors, pread", "fastsafetensors", "Run:ai streamer", "candle"], [WARM],
        one_file=True,
    ),
    **{
        f"tp{world}": Row(f"Partition of one of {world} ranks", CUTTERS, EVERYWHERE, world=world, ranks=(1,))
        for world in (2, 4, 8)
    },
    "tp4-all": Row("All of 4 ranks in one process", CUTTERS, EVERYWHERE, world=4, ranks=(0, 1, 2, 3)),
    "first": Row(
        "First tensor", [who for who in CONTENDERS if who != "safetensors, copied"], [WARM, COLD], first=True
    ),
    "gpt2-lazy": Row("GPT-2, lazy: no byte is touched", GPT2, [WARM], model="gpt2", touch=False),
    "gpt2": Row("GPT-2, every byte touched", GPT2, [WARM], model="gpt2"),
}
