"""Rounds of loads, one process for each, alone on the machine but for who watches its memory."""

import json
import os
import statistics
import sys
from pathlib import Path

import pagecache
from contenders import COLD, CONTENDERS, HUGE, HUGE_ENVIRONMENT, OURS, PLAIN
from processes import Waiting

HERE = Path(__file__).resolve().parent
LOAD_SECONDS = 300
# How often the memory of a load is looked at: that costs some 30 microseconds.
WATCH_SECONDS = 0.01
# What may be missing of a warm file, or left of a cold one; and what may be missing where the system takes pages away
# while they are read.
STRAY, MISSING, FETCHES = 0.001, 0.005, 4


class Failed(Exception):
    """A load that ended without a result."""


class Bench:
    """Measures rows with what an `Environment` has, on what `Weights` wrote."""

    def __init__(self, environment, weights, rounds, leave_out):
        self.environment, self.weights, self.rounds, self.leave_out = environment, weights, rounds, leave_out
        self.servers, self.sums, self.wrong, self.reserve = {}, {}, [], pagecache.Reserve()

    # One load.

    def load(self, name, row, contender, malloc, verify):
        """What it said, and the most memory of its own that it had."""
        task = {
            "loader": contender.loader, "files": self.weights.files(row, contender.files),
            "model": str(self.weights.model(row)), "world": row.world, "ranks": list(row.ranks),
            "cuts": self.weights.cuts(row), "first": row.first, "touch": row.touch, "verify": verify,
        }
        if contender.program == "python":
            process = self.server(malloc)
            process.tell(json.dumps(task))
        else:
            process = Waiting([self.environment.programs[contender.program], json.dumps(task)], with_malloc(malloc))
        try:
            ready = said(process)
            self.reserve.give_back()
            before = own_memory(ready["pid"])
            process.tell()
            result, peak = watched(process, ready["pid"])
            if contender.program == "python" and said(process)["gone"] != 0:
                raise Failed("its process did not end well")
        except (Failed, TimeoutError, ValueError) as error:
            self.end(process)
            raise Failed(str(error)) from None
        if contender.program != "python":
            self.end(process)
        result["peak_bytes"] = peak - before
        self.check(name, row, contender, result)
        return result

    def server(self, malloc):
        """The process that forks one for each load by a Python loader."""
        if malloc not in self.servers:
            command = [self.environment.python, HERE / "tasks.py", self.environment.touch]
            self.servers[malloc] = Waiting(command, with_malloc(malloc))
            said(self.servers[malloc])
        return self.servers[malloc]

    def end(self, process):
        self.servers = {malloc: server for malloc, server in self.servers.items() if server is not process}
        process.end()

    def close(self):
        self.reserve.give_back()
        for server in list(self.servers.values()):
            self.end(server)

    def check(self, name, row, contender, result):
        """Everybody holds the same bytes, and those of the files."""
        digests, sum_ = result.pop("digests"), result.pop("sum")
        if digests is not None and not row.first:
            found = {int(rank): digest for rank, digest in digests.items()}
            if found != self.weights.digests(row):
                raise Wrong(f"{contender.name} loaded other bytes than the files have")
        if sum_ is not None and not row.first and self.sums.setdefault(name, sum_) != sum_:
            raise Wrong(f"{contender.name} loaded other bytes than the others")

    # Rows.

    def measure(self, name, row, state, who, mallocs):
        """All rounds of a row in a state: a line for each contender and malloc. Everybody has a turn in each round, with
        huge pages and without: they make no difference to the page cache."""
        if state == COLD[0] and not self.can_be_cold(row, who):
            return []
        entries = [(CONTENDERS[contender], malloc) for malloc in mallocs for contender in who]
        lines, absent = {}, set()
        for number in range(self.rounds):
            turn = number * len(entries) // self.rounds
            order = entries[turn:] + entries[:turn]
            for contender, malloc in order if number % 2 == 0 else reversed(order):
                if (contender, malloc) in absent:
                    continue
                self.reserve.take(self.weights.landing(row))
                self.prepare(state, self.weights.files(row, contender.files))
                try:
                    result = self.load(name, row, contender, malloc, verify=number == 0 and malloc == PLAIN)
                except (Failed, Wrong) as error:
                    absent.add((contender, malloc))
                    lines.pop((contender.name, malloc), None)
                    self.leave_out(contender.name, f"{row.title}, {state}, {malloc}: {error}")
                    if isinstance(error, Wrong):
                        self.wrong.append(str(error))
                    continue
                line = lines.setdefault(
                    (contender.name, malloc),
                    {"row": name, "who": contender.name, "state": state, "malloc": malloc, "loads": []},
                )
                line["bytes"], line["tensors"] = result.pop("bytes"), result.pop("tensors")
                line["loads"].append(result)
            print(f"  round {number + 1} of {self.rounds}", flush=True)
        return list(lines.values())

    def prepare(self, state, files):
        """Brings the page cache into the state, and looks whether it is."""
        if state == COLD[0]:
            pagecache.drop(files)
            held = pagecache.resident(files)
            if held > STRAY:
                sys.exit(f"the page cache keeps {held:.1%} of {files[0]}: somebody else has it open")
            return
        for _ in range(FETCHES):
            if pagecache.resident(files) >= 1 - STRAY:
                return
            pagecache.fetch(files)
        if (held := pagecache.resident(files)) < 1 - MISSING:
            sys.exit(f"the page cache holds {held:.1%} of {files[0]}: there is too little memory for --size")

    def can_be_cold(self, row, who):
        """Whether files leave the page cache at all. All are read once, so that a host below has all of them alike."""
        for form in sorted({CONTENDERS[contender].files for contender in who}):
            files = self.weights.files(row, form)
            pagecache.drop(files)
            if pagecache.resident(files) > STRAY:
                self.leave_out("cold loads", f"{row.title}: {files[0]} does not leave memory")
                return False
            pagecache.fetch(files)
        return True


class Wrong(Exception):
    """A load that ended well, with wrong bytes."""


def with_malloc(malloc):
    return {**os.environ, **(HUGE_ENVIRONMENT if malloc == HUGE else {})}


def said(process):
    """What a process says next."""
    what = process.next(LOAD_SECONDS)
    if "failed" in what:
        raise Failed(what["failed"])
    if what.get("gone", 0) != 0:
        raise Failed(f"its process ended with status {what['gone']}")
    return what


def watched(process, pid):
    """What a process says next, and the most memory of its own until then."""
    peak, waited = own_memory(pid), 0.0
    while waited < LOAD_SECONDS:
        try:
            what = process.next(WATCH_SECONDS)
            break
        except TimeoutError:
            peak, waited = max(peak, own_memory(pid)), waited + WATCH_SECONDS
    else:
        raise TimeoutError(f"not done within {LOAD_SECONDS} s")
    if "seconds" not in what:
        raise Failed(what.get("failed") or f"its process ended with status {what.get('gone')}")
    return what, peak


def own_memory(pid):
    """Bytes that are no pages of files."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in text.splitlines() if line.startswith(("RssAnon", "RssShmem")))
    return sum(int(value.split()[0]) << 10 for value in lines.values())


def summary(line, ours):
    """A line with its medians; `ours` is ours of the same row and column, round by round."""
    loads = line["loads"]
    seconds = [load["seconds"] for load in loads]
    median = statistics.median(seconds)
    ratios = [mine["seconds"] / own["seconds"] for mine, own in zip(loads, ours["loads"])] if ours else []
    return {
        **line,
        "median_seconds": median, "least_seconds": min(seconds), "most_seconds": max(seconds),
        "load_seconds": statistics.median(load["load_seconds"] for load in loads),
        "cpu_seconds": statistics.median(load["cpu_seconds"] for load in loads),
        "peak_bytes": statistics.median(load["peak_bytes"] for load in loads),
        "gb_per_s": line["bytes"] / median / 1e9,
        "of_ours": statistics.median(ratios) if ratios else None,
    }


def summaries(lines):
    """Lines of any rows with their medians."""
    ours = {(line["row"], line["state"], line["malloc"]): line for line in lines if line["who"] == OURS}
    return [summary(line, ours.get((line["row"], line["state"], line["malloc"]))) for line in lines]
