"""The chart of scripts/compare/run: bars of throughput, as an SVG that is readable on light and dark pages."""

from html import escape

from contenders import COLD, CONTENDERS, HUGE_WARM, OURS, ROWS, WARM

WIDTH, MARGIN, LABEL, VALUE = 840, 24, 176, 112
BAR, THIN, GAP, HEAD = 12, 4, 8, 44
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
# Panels: row, the column that bars show, and the one of the thin bar below.
PANELS = [("whole", WARM, HUGE_WARM), ("whole", COLD, None), ("tp8", WARM, HUGE_WARM), ("tp4-all", WARM, HUGE_WARM)]
TITLES = {"tp8": "Partition of one of 8 tensor-parallel ranks", "tp4-all": "All of 4 tensor-parallel ranks in one process"}
# A background of its own: pages do not always have the colours that the reader's system says.
STYLE = """
.page { fill: #ffffff; stroke: #d0d7de } text { fill: #1f2328 } .dim { fill: #59636e }
.other { fill: #8c959f } .huge { fill: #c4cbd2 } .ours { fill: #0969da } .line { stroke: #d0d7de }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #3d444d } text { fill: #f0f6fc } .dim { fill: #9198a1 }
.other { fill: #7d8590 } .huge { fill: #4b535d } .ours { fill: #4493f8 } .line { stroke: #3d444d }
}"""


def draw(record):
    """All panels for which something was measured, one below the other."""
    top, parts = MARGIN, []
    text, height = legend(record, top)
    parts += text
    top += height
    for row, column, thin in PANELS:
        lines = {
            (line["who"], (line["state"], line["malloc"])): line for line in record["rows"] if line["row"] == row
        }
        shown = [who for who in CONTENDERS if (who, column) in lines]
        if len(shown) > 1:
            title = f"{TITLES.get(row, ROWS[row].title)}, {'from the page cache' if column == WARM else 'page cache empty'}"
            drawn, height = panel(title, lines, shown, column, thin, top)
            parts += drawn
            top += height
    height = top + 4
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="{FONT}" font-size="13" role="img" aria-label="Throughput of ways to load weights, in GB/s">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        *parts,
        "</svg>",
    ]) + "\n"


def legend(record, top):
    llama, machine = record["weights"]["llama"], record["machine"]
    about = f"{llama['bytes'] / 1e9:.1f} GB of bfloat16 into host memory, {machine['cpus']} cores of {machine['cpu']}"
    about += f"; medians of {record['rounds']} rounds"
    row = top + 42
    return [
        words("GB/s from a path to tensors whose every byte was read; longer is better", MARGIN, top + 12, None, 15, True),
        words(about, MARGIN, top + 31, style="dim", size=12),
        bar("ours", MARGIN, row + 5, 22, BAR - 2),
        words("shardlift", MARGIN + 29, row + 15, style="dim", size=12),
        bar("other", MARGIN + 104, row + 5, 22, BAR - 2),
        words("others", MARGIN + 133, row + 15, style="dim", size=12),
        bar("huge", MARGIN + 193, row + 8, 22, THIN),
        words("the same with malloc told to use huge pages", MARGIN + 222, row + 15, style="dim", size=12),
        words("* tensors lent by a mapping of the file", MARGIN + 518, row + 15, style="dim", size=12),
    ], 74


def panel(title, lines, shown, column, thin, top):
    """Bars, longest first, on a scale of the panel's own."""
    def rate(who, of):
        return lines[who, of]["gb_per_s"] if of and (who, of) in lines else 0.0

    shown = sorted(shown, key=lambda who: -rate(who, column))
    longest = max(max(rate(who, column), rate(who, thin)) for who in shown)
    scale = (WIDTH - 2 * MARGIN - LABEL - VALUE) / longest
    parts = [words(title, MARGIN, top + 24, size=13, bold=True)]
    y = top + HEAD - 8
    world = ROWS[lines[shown[0], column]["row"]].world
    for who in shown:
        ours = who.startswith(OURS)
        line = lines[who, column]
        lent = "*" if CONTENDERS[who].memory == "lent" and world == 1 else ""
        # Ours asks for huge pages whatever malloc is told.
        second = 0.0 if ours else rate(who, thin)
        height = BAR + (THIN + 1 if second else 0)
        x = MARGIN + LABEL
        middle = y + BAR / 2 + 4.5 + (THIN / 2 if second else 0)
        parts.append(words(who + lent, x - 10, middle, anchor="end", bold=ours))
        parts.append(bar("ours" if ours else "other", x, y, max(1.0, rate(who, column) * scale), BAR))
        end = rate(who, column)
        if second:
            parts.append(bar("huge", x, y + BAR + 1, max(1.0, second * scale), THIN))
            end = max(end, second)
        value = f"{rate(who, column):.1f}" + (f" / {second:.1f}" if second else "")
        value += f"  ·  {line['median_seconds']:.2f} s"
        parts.append(words(value, x + end * scale + 8, middle, None if ours else "dim", 12, ours))
        y += height + GAP
    axis = MARGIN + LABEL - 0.5
    parts.append(f'<line class="line" x1="{axis}" x2="{axis}" y1="{top + HEAD - 12}" y2="{y - GAP + 4}"/>')
    return parts, y - top + 2


def bar(style, x, y, width, height):
    return f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="1.5"/>'


def words(text, x, y, style=None, size=None, bold=False, anchor=None):
    more = f' class="{style}"' if style else ""
    more += f' font-size="{size}"' if size else ""
    more += ' font-weight="600"' if bold else ""
    more += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(text)}</text>'
