"""The benchmark of scripts/gpu-check: cold and warm loads of a large bf16 checkpoint, by shardlift and by others.

Rounds are interleaved, every other one in reverse order (ABBA). Every load is the first of a fresh process. Others have
imported and have the device's context before their clock starts; shardlift's seconds are those of its `--json`.
`process_seconds` are those of the whole process, imports included, which the others of a round make at the same time.
A load has ended when all of it is on the device.
"""

import importlib.util
import os
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path

from loaders import RIVALS
from pagecache import drop, read, resident
from processes import Ran, Waiting

HERE = Path(__file__).resolve().parent
ROUNDS = {"warm": 8, "cold": 4}
LARGEST, SMALLEST, DRY = 16_000_000_000, 8_000_000_000, 96_000_000
# Kept free on the file system.
RESERVE = 4_000_000_000
# What a warm load reaches of the link, where there are processors enough.
OF_H2D, CPUS = 0.9, 16
# For writing the checkpoint, while the checks run.
WRITE_SECONDS = 45


class Bench:
    """Writes its checkpoint from `with` on, and measures when it is told to."""

    def __init__(self, check):
        self.check = check
        self.model, self.pickle, self.written = check.work / "llama", check.work / "llama.pt", None
        self.device = "cuda:0" if check.devices == "cuda" and not check.options.dry_run else "cpu"
        self.environment = dict(os.environ)
        self.rows, self.sums, self.absent = {}, {}, set()
        self.writer = threading.Thread(target=check.guard, args=[self.write])

    def __enter__(self):
        self.writer.start()
        return self

    def __exit__(self, *_):
        self.writer.join()

    # What is measured on.

    def write(self):
        """Wheels, the checkpoint, and the pickle of the same tensors."""
        check, left = self.check, self.check.deadline.left
        if check.options.wheels:
            site = check.work / "site"
            wheels = sorted(check.options.wheels.glob("*.whl"))
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
            ran = Ran([*pip, "--no-cache-dir", "--target", site, *wheels], left(90))
            if ran.status != 0:
                check.note(f"wheels were not installed: {ran.why()}")
            path = os.environ.get("PYTHONPATH")
            self.environment["PYTHONPATH"] = f"{site}{os.pathsep}{path}" if path else str(site)
        pickled = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("safetensors") is not None
        room = (shutil.disk_usage(check.work).free - RESERVE) // (2 if pickled else 1)
        most = DRY if check.options.dry_run else min(LARGEST, room)
        if most < DRY:
            return check.note(f"no benchmark: no room for a checkpoint in {check.work}")
        command = [sys.executable, HERE / "checkpoint.py", "llama", self.model, most, WRITE_SECONDS]
        ran = Ran(command, left(2 * WRITE_SECONDS))
        if ran.status != 0:
            return check.note(f"no benchmark: the checkpoint was not written: {ran.why()}")
        self.written = ran.json()
        self.files = sorted(map(str, self.model.glob("*.safetensors")))
        if pickled:
            command = [sys.executable, HERE / "loaders.py", "pickle", "cpu", self.pickle, *self.files]
            ran = Ran(command, left(2 * WRITE_SECONDS))
            if ran.status != 0:
                self.leave_out("torch_load", f"its pickle was not written: {ran.why()}")
        else:
            self.leave_out("torch_load", "no torch here to write its pickle with")

    def leave_out(self, rival, why):
        self.absent.add(rival)
        self.check.check(f"benchmark: {rival}", None, why)

    def files_of(self, who):
        return [str(self.pickle)] if who == "torch_load" else self.files

    # Measuring.

    def measure(self):
        self.writer.join()
        check = self.check
        if self.written is None:
            return check.check("benchmark", None, "no checkpoint was written")
        total = self.written["bytes"]
        if total < SMALLEST and not check.options.dry_run:
            check.note(f"the checkpoint has {total / 1e9:.1f} GB: there was no room or no time for more")
        ceilings = {"h2d_torch_gb_per_s": self.h2d(), "h2d_doctor_gb_per_s": doctor_h2d(check.record["doctor"])}
        self.ceiling = max((rate for rate in ceilings.values() if rate), default=None)
        read(self.files, 0)
        ceilings["page_cache_read_gb_per_s"] = read(self.files, 0)
        if (kept := resident(self.files)) < 0.99:
            check.note(f"the page cache holds {kept:.0%} of the checkpoint: warm loads are not quite warm")
        in_memory = ((check.record["doctor"].get("file_system") or {}).get("kind")) == "memory"
        if in_memory:
            check.note("the checkpoint lies in memory: no cold loads")
        else:
            drop(self.files)
            if (kept := resident(self.files)) > 0.01:
                check.note(f"the page cache keeps {kept:.0%} of the checkpoint: cold loads are not quite cold")
            try:
                ceilings["storage_read_gb_per_s"] = read(self.files, os.O_DIRECT)
            except OSError as error:
                check.note(f"no ceiling of the storage: {error}")
        states = ["warm"] if in_memory else ["warm", "cold"]
        for state in states:
            left = check.deadline.left()
            self.rounds(state, time.monotonic() + (left * 0.5 if state != states[-1] else left))
        self.agree()
        rows = [self.summary(row) for row in self.rows.values()]
        check.record["benchmark"] = {"checkpoint": self.written, "ceilings": ceilings, "rows": rows}
        self.hold_against_link(rows)
        show(rows, ceilings, self.written)

    def hold_against_link(self, rows):
        """Whether a warm load by the engine that chooses itself is about as fast as the link."""
        warm = [row["of_h2d"] for row in rows if (row["who"], row["state"]) == ("shardlift auto", "warm")]
        name, cpus = f"benchmark: a warm load has {OF_H2D:.0%} of the link", os.cpu_count() or 1
        if self.check.options.dry_run or not warm or warm[0] is None:
            return self.check.check(name, None, "a dry run" if self.check.options.dry_run else "link or load not measured")
        enough = cpus >= CPUS
        self.check.check(name, warm[0] >= OF_H2D if enough else None, f"{warm[0]:.0%} with {cpus} processors")

    def h2d(self):
        """GB/s of pinned memory to the device, as torch copies it."""
        if self.device == "cpu":
            return None
        process = self.waiting("h2d", [])
        try:
            process.next(self.check.deadline.left(60))
            return process.go(self.check.deadline.left(30))["gb_per_s"]
        except (TimeoutError, ValueError) as error:
            self.check.note(f"no ceiling by torch: {error}")
            return None
        finally:
            process.end()

    def rounds(self, state, until):
        auto, *ours = [f"shardlift {engine}" for engine in self.check.usable_engines()]
        if state == "warm":
            ours.append("shardlift auto, 4 ranks")
        done, longest = 0, 0.0
        while done < ROUNDS[state] and time.monotonic() + longest * 1.1 < until:
            start = time.monotonic()
            waiting = {who: self.prepared(who) for who in RIVALS if who not in self.absent}
            waiting = {who: process for who, process in waiting.items() if self.ready(who, process)}
            # Where storage is so slow that even the first round is cut short, it is our engines that are left out.
            everyone = [auto, *waiting, *ours]
            for who in everyone if done % 2 == 0 else reversed(everyone):
                left = until - time.monotonic()
                if left < 1:
                    break
                if state == "cold":
                    drop(self.files_of(who))
                elif done == 0:
                    read(self.files_of(who), 0)
                if who in waiting:
                    self.rival(who, state, waiting[who], left)
                else:
                    self.ours(who, state, left)
            for process in waiting.values():
                process.end()
            longest = max(longest, time.monotonic() - start)
            done += 1
        if done < ROUNDS[state]:
            self.check.note(f"{done} of {ROUNDS[state]} {state} rounds: no time for more")

    def prepared(self, who):
        return self.waiting(who, self.files_of(who))

    def waiting(self, who, files):
        return Waiting([sys.executable, HERE / "loaders.py", who, self.device, *files], self.environment)

    def ready(self, who, process):
        """Whether it can load at all."""
        try:
            process.preparation = process.next(self.check.deadline.left(60))
            self.check.record["versions"][process.preparation["package"]] = process.preparation["version"]
        except (TimeoutError, ValueError) as error:
            self.leave_out(who, str(error))
            process.end()
            return False
        return True

    def rival(self, who, state, process, left):
        try:
            result = process.go(left)
        except TimeoutError:
            return self.check.note(f"{who} {state}: not done in the {left:.0f} s that were left")
        except ValueError as error:
            return self.leave_out(who, str(error))
        if result["elsewhere"] or result["bytes"] != self.written["bytes"]:
            return self.leave_out(who, f"{result['bytes']} bytes landed, some of them on {result['elsewhere']}")
        self.sums.setdefault(result["sum"], set()).add(who)
        before = process.preparation["import_seconds"] + process.preparation["context_seconds"]
        self.add(who, state, result["seconds"], before + result["seconds"])

    def ours(self, who, state, left):
        engine = who.split()[1].rstrip(",")
        ranks = 4 if who.endswith("ranks") else 1
        rules = ["--rules", "replicate"] if ranks == 1 else ["--tp", ranks]
        devices = self.check.on(ranks)
        ran = self.check.run("load", self.model, *rules, "--devices", devices, "--engine", engine, seconds=left)
        if ran.status == 0:
            self.add(who, state, ran.json()["seconds"], ran.seconds)
        elif ran.late:
            self.check.note(f"{who} {state}: not done in the {left:.0f} s that were left")
        else:
            self.check.check(f"benchmark: {who} {state}", False, ran.why())

    def add(self, who, state, seconds, process_seconds):
        row = self.rows.setdefault((who, state), {"who": who, "state": state, "seconds": [], "process_seconds": []})
        row["seconds"].append(seconds)
        row["process_seconds"].append(process_seconds)

    def agree(self):
        """All that torch holds was the same; what shardlift lands is compared with the files once."""
        if self.sums:
            groups = " against ".join(", ".join(sorted(group)) for group in self.sums.values())
            self.check.check("benchmark: others' tensors are equal", len(self.sums) == 1, groups)
        if self.check.deadline.left() < 30:
            return self.check.check("benchmark: shardlift --check", None, "no time left")
        ran = self.check.run(
            "load", self.model, "--rules", "replicate", "--devices", self.check.on(1), "--check", seconds=60
        )
        ok = ran.status == 0 and ran.json()["checked"]
        self.check.check("benchmark: shardlift --check", None if ran.late else ok, "" if ok else ran.why())

    def summary(self, row):
        median = statistics.median(row["seconds"])
        rate = self.written["bytes"] / median / 1e9
        return row | {
            "median_seconds": median,
            "least_seconds": min(row["seconds"]),
            "most_seconds": max(row["seconds"]),
            "gb_per_s": rate,
            "of_h2d": rate / self.ceiling if self.ceiling else None,
        }


def doctor_h2d(doctor):
    """GB/s of pinned memory to the first device, as the doctor measured it."""
    devices = (doctor.get("cuda") or {}).get("devices") or [{}]
    return devices[0].get("h2d_gb_per_s")


def show(rows, ceilings, written):
    print(f"\n{written['bytes'] / 1e9:.2f} GB of bf16 in {written['tensors']} tensors")
    for name, rate in ceilings.items():
        print(f"  {name}: {f'{rate:.2f}' if rate else 'not known'}")
    print(f"\n{'who':28}{'state':6}{'loads':>6}{'median s':>10}{'least':>9}{'most':>9}{'GB/s':>8}{'of H2D':>8}")
    for row in sorted(rows, key=lambda row: (row["state"], row["median_seconds"])):
        seconds = f"{row['median_seconds']:10.3f}{row['least_seconds']:9.3f}{row['most_seconds']:9.3f}"
        share = f"{row['of_h2d']:8.0%}" if row["of_h2d"] else f"{'-':>8}"
        print(f"{row['who']:28}{row['state']:6}{len(row['seconds']):6}{seconds}{row['gb_per_s']:8.2f}{share}")
