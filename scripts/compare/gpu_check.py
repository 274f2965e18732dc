"""What scripts/gpu-check runs: checks of every kind of load on this machine's GPU, then loads against other loaders.

Everything happens before a deadline: what no longer fits is left out, and the record says so. A check that cannot be
made here is SKIPPED with its reason, never counted as passed.
"""

import argparse
import ctypes
import datetime
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_bench import Bench
from processes import Ran, kill_all

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
PACK = REPOSITORY / "target/gpu-pack"
TWINS = REPOSITORY / "target/twins"
ENGINES = ["auto", "pread", "uring", "mmap"]
RANKS = [1, 2, 4, 8]
# Seconds that are kept for the end: adding up, writing, removing files.
CLOSING = 10
# The first tensor of a load is there so soon after `start`.
FIRST_TENSOR_MS = 150
# The first NCCL that lets several ranks have one GPU, with NCCL_MULTI_RANK_GPU_ENABLE=1.
SHARED_GPU = (2, 30)
# Seconds for one load of ranks that read together.
TOGETHER = 60
# `CU_DEVICE_ATTRIBUTE_COMPUTE_MODE`
COMPUTE_MODE = 20


class Deadline:
    """The end of everything."""

    def __init__(self, seconds):
        self.at = time.monotonic() + seconds

    def left(self, most=float("inf")):
        """Seconds until then, `most` at most; never none at all, so that a process started late ends by time-out."""
        return max(0.1, min(most, self.at - time.monotonic() - CLOSING))


class Check:
    """Runs it all and keeps the record."""

    def __init__(self, options, work):
        self.options, self.work, self.model = options, work, work / "every-dtype"
        self.deadline = Deadline(options.budget)
        self.shardlift = PACK / "shardlift"
        # Kernels that one process has compiled the others find: in a folder that can be written.
        self.environment, self.devices = {"CUDA_CACHE_PATH": str(work / "compiled")}, "cuda"
        if options.dry_run:
            # One device that answers at once. Without twins the ranks live in host memory: only this program is tried.
            self.environment = {"LD_LIBRARY_PATH": str(TWINS), "SIMCUDA_DEVICES": "1"}
            if not (TWINS / "libcuda.so.1").exists():
                self.environment, self.devices = {}, "host:staged"
        self.record = {"version": 1, "dry_run": options.dry_run, "checks": [], "benchmark": None, "notes": []}
        self.record["phase_seconds"] = {}
        self.writing = threading.Lock()

    # What is written down.

    def note(self, text):
        print(f"note: {text}")
        self.record["notes"].append(text)

    def check(self, name, ok, detail=""):
        """`ok` is None for a check that could not be made."""
        self.record["checks"].append({"name": name, "ok": ok, "detail": detail})
        word = {True: "ok", False: "FAILED", None: "SKIPPED"}[ok]
        print(f"{word:8}{name}{': ' + detail if detail else ''}")

    def guard(self, phase):
        """A mistake of this program in one phase is a failed check, and the next phase runs."""
        start = time.monotonic()
        try:
            phase()
        except Exception as error:
            traceback.print_exc()
            self.check(phase.__name__, False, f"{type(error).__name__}: {error}")
        self.record["phase_seconds"][phase.__name__] = time.monotonic() - start
        try:
            self.write()
        except RuntimeError:
            pass  # another phase adds to the record at this moment, and will write it

    def write(self):
        """After each phase, and when interrupted: a machine with a GPU may not come again soon."""
        with self.writing:
            path = self.options.out / "gpu-check.json"
            path.write_text(json.dumps(self.record, indent=1) + "\n")
        return path

    # What runs.

    def run(self, *arguments, seconds, tool=()):
        return Ran([*tool, self.shardlift, *arguments, "--json"], self.deadline.left(seconds), self.environment)

    def on(self, ranks):
        """All ranks on the first device."""
        return f"cuda:{','.join('0' * ranks)}" if self.devices == "cuda" else self.devices

    def look_around(self):
        """The doctor's word, and this machine. Exits with 4 where there is no GPU to check."""
        made = Ran([sys.executable, HERE / "checkpoint.py", "every-dtype", self.model], self.deadline.left(60))
        if made.status != 0:
            sys.exit(f"no checkpoint in {self.model}: {made.why()}")
        ran = self.run("doctor", self.model, seconds=60)
        doctor = ran.json()
        if ran.status != 0 or doctor is None:
            sys.exit(f"doctor: {ran.why()}")
        cuda = doctor.get("cuda") or {}
        if not cuda.get("usable") and self.devices == "cuda":
            print(f"no GPU: {cuda.get('why') or 'not known why'}", file=sys.stderr)
            sys.exit(4)
        self.check("doctor", True)
        self.hold()
        if self.devices != "cuda":
            self.note(f"no driver twin in {TWINS}: all ranks are in host memory")
        built = json.loads((PACK / "built.json").read_text())
        query = "name,memory.total,driver_version,pcie.link.gen.current,pcie.link.width.current"
        try:
            smi = Ran(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], self.deadline.left(20))
            gpus = [line.split(", ") for line in smi.out.splitlines() if line.count(",") == 4]
        except OSError:
            gpus = []
        self.record |= {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": built["commit"], "modified": built["modified"],
            "driver": gpus[0][2] if gpus else cuda.get("driver_version"),
            "hardware": {
                "gpus": [dict(zip(query.split(","), gpu)) for gpu in gpus],
                "cpu": cpu_model(), "cpus": doctor.get("cpus"), "memory_bytes": doctor.get("memory_bytes"),
                "file_system": doctor.get("file_system"),
            },
            "versions": {
                "shardlift": Ran([self.shardlift, "--version"], 10).out.strip(), "rustc": built["rustc"],
                "python": platform.python_version(), "kernel": platform.release(),
            },
            "doctor": doctor,
        }

    def hold(self):
        """A context of this process for as long as it runs: otherwise the GPU is made ready anew for each process."""
        if self.options.dry_run:
            return
        try:
            cuda, mode, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
            status = cuda.cuInit(0) or cuda.cuDeviceGetAttribute(ctypes.byref(mode), COMPUTE_MODE, 0)
            if status == 0 and mode.value != 0:
                return self.note(f"compute mode {mode.value}: only one process at a time may have a context")
            status = status or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
            if status != 0:
                self.note(f"no context is held: status {status}")
        except OSError as error:
            self.note(f"no context is held: {error}")

    def usable_engines(self):
        known = self.record["doctor"]["engines"]
        usable = [engine for engine in ENGINES if engine == "auto" or known[engine]["usable"]]
        return usable + (["cufile"] if self.cufile() else [])

    def cufile(self):
        """Whether loads through cuFile can be checked: where it opens, and reads from here; says what it found."""
        if "cufile" in self.record:
            return self.record["cufile"]["direct"] is not None
        found = self.record["doctor"].get("cufile") or {}
        self.record["cufile"] = {"direct": None, **{key: found.get(key) for key in ("version", "measured")}}
        if not found.get("usable"):
            self.check("loads: cufile", None, found.get("why") or "the doctor does not say")
            return False
        # Whether it reads from this file system is known when it has.
        ran = self.run("load", self.model, "--devices", self.on(1), "--engine", "cufile", "--rules", "replicate", seconds=90)
        report = ran.json() if ran.status == 0 else None
        if report is None:
            self.check("loads: cufile", None, ran.why())
            return False
        self.record["cufile"].update(direct=report["direct"], gb_per_s=report["gb_per_s"])
        self.check("loads: cufile", True, f"version {found['version']}, direct: {report['direct']}")
        return True

    def hardware_tests(self):
        """The tests that were packed: what the driver twin does, a real driver must do."""
        tests = sorted((PACK / "tests").iterdir()) if (PACK / "tests").is_dir() else []
        if not tests:
            self.check("hardware tests", None, "none in the pack")
        for test in tests:
            environment = {**self.environment, "SHARDLIFT_REQUIRE_GPU": "1", "RUST_BACKTRACE": "0"}
            ran = Ran([test, "--show-output"], self.deadline.left(120), environment)
            lines = ran.out.splitlines()
            for line in lines:
                if line.startswith("SKIPPED: "):
                    self.check(f"hardware tests: {test.name}", None, line.removeprefix("SKIPPED: "))
            for line in lines:
                if line.startswith("MEASURED: "):
                    name, value = line.removeprefix("MEASURED: ").split()
                    self.record.setdefault("measured", {})[name] = float(value)
            summary = [line for line in lines if line.startswith("test result:")]
            failed = [line for line in lines if line.endswith("... FAILED")]
            detail = "; ".join(failed + summary) if summary and not ran.late else ran.why()
            self.check(f"hardware tests: {test.name}", ran.status == 0, detail)
            if ran.status != 0:
                output = "\n".join(lines[-200:] + ran.err.splitlines()[-50:])
                print(output)
                self.record.setdefault("failures", {})[test.name] = output

        took = self.record.get("measured", {}).get("first_tensor_ms")
        if took is not None:
            # The twin's time says nothing.
            ok = None if self.options.dry_run else took <= FIRST_TENSOR_MS
            self.check(f"first tensor within {FIRST_TENSOR_MS} ms", ok, f"{took:.0f} ms after start")

    def loads(self):
        """Every engine, number of ranks and way to change every dtype: bit for bit, and as on the host."""
        engines = self.usable_engines()
        for engine in sorted(set(ENGINES) - set(engines)):  # cuFile has said so itself
            self.check(f"loads: {engine}", None, self.record["doctor"]["engines"][engine]["why"])
        cases = [(rules, ranks, engine, ()) for rules in ("cuts", "changes") for ranks in RANKS for engine in engines]
        cases += [
            (rules, 2, "auto", more)
            for rules in ("cuts", "changes")
            for more in (("--memory", "per-tensor"), ("--staging", "2M"), ("--dtype", "f16"), ("--page-cache", "drop"))
        ]
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            # Of all that, only `--dtype` changes what lands.
            alike = [(rules, ranks, more if "--dtype" in more else ()) for rules, ranks, _, more in cases]
            hosts = {case: pool.submit(self.load, *case, "auto", "host") for case in set(alike)}
            loads = [
                pool.submit(self.load, rules, ranks, more, engine, self.on(ranks))
                for rules, ranks, engine, more in cases
            ]
            for (rules, ranks, engine, more), like, load in zip(cases, alike, loads):
                (host, expected), (ran, found) = hosts[like].result(), load.result()
                name = " ".join(["loads:", rules, f"{ranks} ranks", engine, *more])
                if expected is None or found is None:
                    late = (host.late or ran.late) and self.deadline.left() < 1
                    why = ran.why() if found is None else f"on the host: {host.why()}"
                    self.check(name, None if late else False, why)
                elif found != expected:
                    self.check(name, False, "other digests than on the host")
                else:
                    read = ran.json()["engine"]
                    self.check(name, True, "" if engine in ("auto", read) else f"read with {read}")

    def load(self, rules, ranks, more, engine, devices):
        """What ran, and the ranks' digests if it compared every byte."""
        ran = self.run(
            "load", self.model, "--rules", self.model / f"{rules}.toml", "--tp", ranks, "--devices", devices,
            "--engine", engine, "--check", *more, seconds=60,
        )
        found = ran.json() if ran.status == 0 else None
        return ran, [rank["digest"] for rank in found["ranks"]] if found and found["checked"] else None

    def together(self):
        """Ranks with a process each that read together over NCCL: bit for bit, and as on the host."""
        nccl, gpus = self.record["doctor"]["nccl"], (self.record["doctor"].get("cuda") or {}).get("devices") or []
        if self.devices != "cuda" or not nccl["usable"]:
            return self.check("together", None, "no GPU" if self.devices != "cuda" else f"no NCCL: {nccl['why']}")
        shares = tuple(map(int, nccl["version"].split("."))) >= SHARED_GPU
        for ranks in (1, 2, 4):
            name = f"together: {ranks} ranks, NCCL {nccl['version']}"
            if ranks > max(1, len(gpus)) and not shares:
                self.check(name, None, f"on one GPU only from NCCL {'.'.join(map(str, SHARED_GPU))} on")
                continue
            with tempfile.TemporaryDirectory(dir=self.work) as folder, ThreadPoolExecutor(max_workers=ranks) as pool:
                _, expected = self.load("cuts", ranks, (), "auto", "host")
                loads = [pool.submit(self.load_one, rank, ranks, len(gpus), Path(folder)) for rank in range(ranks)]
                self.compare(name, expected, [load.result() for load in loads])

    def load_one(self, rank, ranks, gpus, folder):
        """What ran for one of several ranks, on a GPU of its own where there are so many."""
        gpu = rank if ranks <= gpus else 0
        environment = {**self.environment, **({} if ranks <= gpus else {"NCCL_MULTI_RANK_GPU_ENABLE": "1"})}
        arguments = [
            "load", self.model, "--rules", self.model / "cuts.toml", "--tp", ranks, "--rank", rank, "--devices",
            f"cuda:{gpu}", "--cooperate", "always", "--rendezvous", f"file://{folder / 'meeting'}", "--check", "--json",
        ]
        # Whoever fails tells the others; a rank that is killed here is told of by them.
        return Ran([self.shardlift, *arguments], self.deadline.left(TOGETHER), environment)

    def compare(self, name, expected, ran):
        """Holds what each rank has, and what they read and passed on, against what must be."""
        loads = [one.json() if one.status == 0 else None for one in ran]
        if expected is None or None in loads:
            failed = next((one for one, load in zip(ran, loads) if load is None), None)
            late = failed is not None and failed.late and self.deadline.left() < 1
            return self.check(name, None if late else False, failed.why() if failed else "no load on the host")
        found = [load["ranks"][0]["digest"] for load in loads]
        read, sent, received = (
            sum(load[field] for load in loads) for field in ("storage_bytes_read", "sent_bytes", "received_bytes")
        )
        if found != expected:
            self.check(name, False, "other digests than on the host")
        elif sent != received or (sent > 0) != (len(ran) > 1):
            self.check(name, False, f"sent {sent} bytes, received {received}")
        else:
            self.check(name, True, f"read {read} bytes, passed on {sent}")

    def sanitizer(self):
        """A load under compute-sanitizer, with each of its tools."""
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if self.options.dry_run or not Path(tool).exists():
            return self.check("compute-sanitizer", None, "a dry run" if self.options.dry_run else "not installed")
        # It slows down what it looks at by far more than ten times.
        small = ["--rules", self.model / "changes.toml", "--skip", "**.large.**"]
        for kind in ("memcheck", "racecheck", "synccheck"):
            ran = self.run(
                "load", self.model, *small, "--tp", 2, "--devices", self.on(2), "--check", seconds=30,
                tool=[tool, "--tool", kind, "--error-exitcode", "9"],
            )
            text = ran.out + ran.err
            summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
            if "not supported" in text or ran.late:
                self.check(f"compute-sanitizer {kind}", None, ran.why())
            else:
                self.check(f"compute-sanitizer {kind}", ran.status == 0, "; ".join(summary) or ran.why())


def roomiest(*folders):
    """Where most is free. Memory only counts where no disk has room: loads from it are never cold."""
    def free(folder):
        return shutil.disk_usage(folder).free if folder.is_dir() and os.access(folder, os.W_OK) else 0

    disk = max(map(Path, (*folders, REPOSITORY / "target", tempfile.gettempdir())), key=free)
    memory = Path("/dev/shm")
    return memory if free(disk) < 12_000_000_000 and free(memory) > free(disk) else disk


def cpu_model():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def main():
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "target/gpu-check", help="folder of the record")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of other loaders, to be installed for this run")
    parser.add_argument("--dir", type=Path, help="folder for the checkpoints (default: the roomiest)")
    parser.add_argument("--budget", type=float, default=520, help="seconds for everything (default 520)")
    parser.add_argument("--dry-run", action="store_true", help="all of it on the driver twin, with little data")
    options = parser.parse_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu-check.json").touch()
    except OSError as error:
        options.out = Path(tempfile.mkdtemp(prefix="gpu-check."))
        print(f"note: {error}: the record will be in {options.out}")

    def interrupted(number, _):
        # Ends as an exception, so that the checkpoints are removed.
        kill_all()
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, interrupted)
    with tempfile.TemporaryDirectory(prefix="gpu-check.", dir=options.dir or roomiest(options.out)) as work:
        check = Check(options, Path(work))
        check.look_around()
        try:
            with Bench(check) as bench:
                for phase in (check.hardware_tests, check.loads, check.together, check.sanitizer, bench.measure):
                    check.guard(phase)
        finally:
            path = check.write()
    count = {ok: sum(entry["ok"] is ok for entry in check.record["checks"]) for ok in (True, False, None)}
    print(f"\n{count[True]} checks ok, {count[False]} failed, {count[None]} skipped; {path}")
    sys.exit(1 if count[False] else 0)


if __name__ == "__main__":
    main()
