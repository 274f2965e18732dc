"""What scripts/compare/run needs, in a folder of its own: a virtual environment and two Rust programs."""

import hashlib
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from processes import Ran

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
FOLDER = REPOSITORY / ".cache/compare"
REQUIREMENTS = HERE / "requirements.txt"
INSTALLED_GB, MINUTES = 5.6, 30
# Without these nobody could be compared with.
NEEDED = ("torch", "numpy", "safetensors")
# Which package a contender comes from, where it isn't called the same.
PACKAGES = {"fastsafetensors": "fastsafetensors", "Run:ai streamer": "runai-model-streamer", "tensorizer": "tensorizer"}


class Environment:
    """Ready to measure: the programs' paths, versions, and why some contenders are left out."""

    def __init__(self, wanted):
        self.left_out, self.versions = {}, {"python": platform.python_version(), "kernel": platform.release().split("-")[0]}
        self.python = self.virtual_environment()
        self.programs, self.touch = {}, None
        self.rust("shardlift", wanted)
        if "candle" in wanted:
            self.rust("candle", wanted)
        self.left_out["InstantTensor"] = "loads to GPUs only; scripts/gpu-check measures it where there is one"

    def virtual_environment(self):
        """The interpreter of an environment with all that requirements.txt names."""
        folder = FOLDER / "venv"
        python, stamp = folder / "bin/python", folder / "requirements.sha256"
        digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
        if not (python.exists() and stamp.exists() and stamp.read_text() == digest):
            print(f"installing other loaders into {folder}: about {INSTALLED_GB} GB, most of it torch with CUDA's libraries")
            free = shutil.disk_usage(FOLDER if FOLDER.exists() else REPOSITORY).free
            if free < INSTALLED_GB * 1.2e9:
                sys.exit(f"{folder} needs {INSTALLED_GB} GB and has room for {free / 1e9:.1f}")
            run([sys.executable, "-m", "venv", folder], "no virtual environment")
            self.install(python)
            stamp.write_text(digest)
        listed = Ran([python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"], 120)
        installed = {package["name"].lower(): package["version"] for package in listed.json() or []}
        for line in requirements():
            name = line.split("==")[0]
            if name in installed:
                self.versions[name] = installed[name]
            elif name in NEEDED:
                sys.exit(f"{folder} has no {name}: remove it, and it will be made anew")
        for who, package in PACKAGES.items():
            if package not in installed:
                self.left_out[who] = f"{package} could not be installed"
        return python

    def install(self, python):
        pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
        if Ran([*pip, "-r", REQUIREMENTS], 60 * MINUTES).status == 0:
            return
        # There is not a wheel of each for every machine.
        for line in requirements():
            ran = Ran([*pip, line], 60 * MINUTES)
            if ran.status != 0 and line.split("==")[0] in NEEDED:
                sys.exit(f"{line} was not installed: {ran.why()}")

    def rust(self, name, wanted):
        """Builds the program that loads by `name`."""
        target = FOLDER / "target"
        # candle is a package on its own, the other one a member of the repository's workspace.
        manifest = HERE / "candle/Cargo.toml" if name == "candle" else REPOSITORY / "Cargo.toml"
        build = ["cargo", "build", "--release", "--locked", "--manifest-path", manifest, "--target-dir", target]
        build += ["--package", f"compare-{name}", "--package", "compare-protocol"]
        if not (target / f"release/compare-{name}").exists():
            print(f"building compare-{name} in {target}")
        try:
            ran = Ran(build, 60 * MINUTES)
        except OSError as error:
            sys.exit(f"cannot run cargo: {error}")
        if ran.status != 0:
            if name == "candle":
                self.left_out[name] = f"it was not built: {ran.why()}"
                return
            sys.exit(f"compare-{name} was not built: {ran.why()}")
        self.programs[name] = target / f"release/compare-{name}"
        if name == "candle":
            lock = (HERE / "candle/Cargo.lock").read_text()
            self.versions["candle-nn"] = re.search(r'name = "candle-nn"\nversion = "([^"]*)"', lock)[1]
        else:
            self.touch = next(target.glob("release/libcompare_protocol.*[os]"), None)
            if self.touch is None:
                sys.exit(f"cargo made no library of compare-protocol in {target}/release")
            manifest = (REPOSITORY / "Cargo.toml").read_text()
            self.versions["shardlift"] = re.search(r'^version = "([^"]*)"', manifest, re.M)[1]
            self.versions["rustc"] = Ran(["rustc", "--version"], 60).out.strip()
            git = Ran(["git", "-C", REPOSITORY, "describe", "--always", "--dirty", "--abbrev=12"], 60)
            self.versions["commit"] = git.out.strip() or None


def requirements():
    lines = REQUIREMENTS.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def run(command, what):
    ran = Ran(command, 60 * MINUTES)
    if ran.status != 0:
        sys.exit(f"{what}: {ran.why()}")


def machine(folder):
    """What is measured on."""
    cpu = next(
        (line.split(": ", 1)[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "cpu": cpu, "cpus": len(os.sched_getaffinity(0)), "memory_bytes": memory("MemTotal"),
        "file_system": file_system(folder), "huge_pages": huge_pages(),
    }


def memory(name):
    """Bytes, as /proc/meminfo tells them."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def huge_pages():
    """Who gets transparent huge pages: `always`, `madvise` or `never`; None without them."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0]


def file_system(folder):
    """Its type, by the mount that the folder is below of."""
    folder, found = str(Path(folder).resolve()), ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if f"{folder}/".startswith(mount.rstrip("/") + "/"):
            found = max(found, (mount, kind))
    return found[1]
