"""Results of scripts/compare/run as files: JSON, a table, a chart."""

import json

import chart
from contenders import COLD, CONTENDERS, HUGE_WARM, OURS, ROWS, WARM

MISSING = "-"


def write(record, folder):
    """Writes all three; a run that is interrupted leaves what it has measured."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "compare.md").write_text(page(record))
    (folder / "compare.svg").write_text(chart.draw(record))


def page(record):
    """The page of docs/compare.md."""
    machine, versions, llama = record["machine"], record["versions"], record["weights"]["llama"]
    commits = sorted({line["commit"] for line in record["rows"]} or {versions["commit"]})
    others = ", ".join(f"{name} {version}" for name, version in versions.items() if name not in NOT_LOADERS)
    lines = [
        "# Beside other ways to load weights",
        "",
        "Written by `scripts/compare/run`; findings are in [performance.md](performance.md).",
        "",
        *(["**A run with little data and one round: the figures mean nothing.**", ""] if record["quick"] else []),
        "![Throughput of each loader](compare.svg)",
        "",
        f"{record['date'][:10]}, {machine['cpus']} cores of {machine['cpu']}, {machine['memory_bytes'] / 1e9:.0f} GB of "
        f"memory, {machine['file_system']}, Linux {versions['kernel']}. "
        f"shardlift {versions['shardlift']} ({', '.join(commits)}), {others}.",
        "",
        f"Weights: {llama['bytes'] / 1e9:.2f} GB of random bfloat16 in {llama['tensors']} tensors of the shapes of a Llama, "
        f"{llama['shards']} files of safetensors, one pickle, one file of tensorizer's.",
        "",
        *HOW,
        "",
    ]
    for name, row in ROWS.items():
        if name in GPT2:
            continue
        found = [line for line in record["rows"] if line["row"] == name]
        if found:
            lines += [f"## {row.title}", "", *NOTES.get(name, []), *table_of(found), ""]
    if lazy := [line for line in record["rows"] if line["row"] in GPT2]:
        lines += ["## GPT-2: the lazy figure, and an honest one", "", *gpt2_note(record), *gpt2_table(lazy), ""]
    lines += ["## Contenders", "", "| | how it loads |", "|---|---|"]
    lines += [f"| {name} | {contender.note or 'the crate, its defaults'} |" for name, contender in CONTENDERS.items()]
    if record["left_out"]:
        lines += ["", "Left out:", ""]
        lines += [f"- {entry['who']}: {entry['why']}" for entry in unique(record["left_out"])]
    return "\n".join(lines) + "\n"


def table(record):
    """What a terminal shows in the end."""
    lines = []
    for name, row in ROWS.items():
        if found := [line for line in record["rows"] if line["row"] == name]:
            lines += ["", row.title, *table_of(found)]
    return "\n".join(lines)


def table_of(found):
    """A row's table: whoever is fastest warm comes first. Columns that nobody has are left out."""
    lines = {}
    for line in found:
        lines.setdefault(line["who"], {})[line["state"], line["malloc"]] = line
    first_tensor = ROWS[found[0]["row"]].first
    rate = "MB" if first_tensor else "GB/s"
    columns = [column for column in (WARM, HUGE_WARM, COLD) if any(column in cells for cells in lines.values())]
    head = ["", "tensors"] + [text for column in columns for text in (f"{HEADS[column]}, s", rate, "of ours")]
    head += ["CPU s", "peak MB"]
    first = columns[0]

    def speed(item):
        cells = item[1]
        return cells[first]["median_seconds"] if first in cells else float("inf")

    rows = []
    for who, cells in sorted(lines.items(), key=speed):
        # Where ranks get parts everybody makes memory for them.
        memory = "lent" if CONTENDERS[who].memory == "lent" and ROWS[found[0]["row"]].world == 1 else "own"
        texts = [f"**{who}**" if who == OURS else who, memory]
        for column in columns:
            texts += cell(cells.get(column), first_tensor)
        own = next((cells[column] for column in columns if column in cells))
        texts += [f"{own['cpu_seconds']:.2f}", f"{own['peak_bytes'] / 1e6:,.0f}"]
        rows.append(f"| {' | '.join(texts)} |")
    return [f"| {' | '.join(head)} |", f"|{'---|' * 2}{'---:|' * (len(head) - 2)}", *rows]


def cell(line, first_tensor):
    if line is None:
        return [MISSING] * 3
    of_ours = f"{line['of_ours']:.2f}" if line["of_ours"] else MISSING
    spread = f"{line['median_seconds']:.3f} ({line['least_seconds']:.3f} - {line['most_seconds']:.3f})"
    rate = f"{line['bytes'] / 1e6:.3g}" if first_tensor else f"{line['gb_per_s']:.1f}"
    return [spread, rate, of_ours]


def gpt2_table(found):
    """Milliseconds of both rows, and how many times faster than pickle each is."""
    seconds = {(line["who"], line["row"]): line["median_seconds"] for line in found}
    rows = ["| | lazy, ms | pickle / it | every byte touched, ms | pickle / it |", "|---|---:|---:|---:|---:|"]
    for who in ROWS["gpt2"].who:
        texts = [f"**{who}**" if who == OURS else who]
        for row in ("gpt2-lazy", "gpt2"):
            own, pickle = seconds.get((who, row)), seconds.get(("torch.load", row))
            texts += [f"{own * 1e3:.1f}", f"{pickle / own:.1f}" if pickle else MISSING] if own else [MISSING] * 2
        rows.append(f"| {' | '.join(texts)} |")
    return rows


def gpt2_note(record):
    size = record["weights"]["gpt2"]["bytes"] / 1e6
    return [
        f"{size:.0f} MB of float32 as GPT-2 has them. The documentation of safetensors tells of 76.6 times the speed of pickle on",
        "a CPU for these: nothing is read then but a header. *Lazy* repeats that, the other column is with every byte read once.",
        "What `torch.load` and shardlift have in the lazy column is all the same a copy that they own.",
        "",
    ]


def unique(entries):
    return list({(entry["who"], entry["why"]): entry for entry in entries}.values())


HEADS = {WARM: "warm", HUGE_WARM: "warm, huge pages", COLD: "cold"}
GPT2 = ("gpt2", "gpt2-lazy")
NOT_LOADERS = {"python", "kernel", "shardlift", "commit", "rustc", "numpy"}
HOW = """\
- Seconds are from a path to tensors of which every byte was read once: opening, parsing, planning, allocating, loading and
  reading are in them, imports and the end of the process are not. All read in the same way (sums of 64-bit words on all
  cores, the same compiled function for Python and Rust), so what a lazy loader has put off is in its seconds.
- Each load is the first of a process of its own, into memory that the process has never touched. Python's are forked from
  one that has imported everything. As much memory as it takes is held between loads, in huge pages, and given back right
  before each: a virtual machine may lose what is free for a while, and whoever came next would pay for that.
- Medians, with the fastest and the slowest in brackets. Everybody has a turn in each round; every round starts with somebody
  else, and every other one runs backwards. *of ours* is the median over the rounds of its seconds by ours, so above 1 is
  slower than shardlift.
- *warm*: all of the files is in the page cache. *cold*: none of it, asked of the kernel (mincore) before each load; what a
  host below a virtual machine keeps is out of reach, so all files are read once before. Both are checked, to 0.5% and
  0.1%.
- *huge pages*: `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` and `THP_MEM_ALLOC_ENABLE=1`, for everybody. shardlift asks for huge
  pages by itself.
- *tensors*: whether they are in memory of their own, or lent by a mapping of the file, which must then stay as it is.
- *CPU s*: of all threads, in the kernel too; *peak MB*: the most memory at a time that is no page of a file. Both warm.
- In the first round each contender's tensors are held against the files by SHA-256, in all rounds against each other by the
  sums.""".splitlines()
NOTES = {
    "first": [
        "Until the first tensor that a loader hands out, whichever it chooses, was read: whole, in memory. Loaders that hand out",
        "all tensors together need as long as for all. *MB* is its size.", "",
    ],
    "tp4-all": [
        "Every rank's part lands in memory of its own; what all ranks have whole (embeddings and norms) lands four times. GB/s",
        "are of the bytes of the files.", "",
    ],
}
