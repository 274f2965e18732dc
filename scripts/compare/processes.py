"""The processes that scripts/gpu-check and scripts/compare/run start: none outlives them, and none is waited for without
bound."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time

RUNNING = set()
STOPPING = threading.Event()


def kill(process):
    """Kills it and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def kill_all():
    """Nothing goes on, and nothing more starts."""
    STOPPING.set()
    for process in list(RUNNING):
        kill(process)


class Ran:
    """A process that has ended, or was ended with all its children after `seconds`."""

    def __init__(self, command, seconds, environment=None):
        if STOPPING.is_set():
            sys.exit("interrupted")
        start = time.monotonic()
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", env={**os.environ, **(environment or {})}, start_new_session=True,
        )
        RUNNING.add(process)
        try:
            self.out, self.err = process.communicate(timeout=seconds)
            self.late = False
        except subprocess.TimeoutExpired:
            kill(process)
            self.out, self.err = process.communicate()
            self.late = True
        RUNNING.discard(process)
        self.status, self.seconds = process.returncode, time.monotonic() - start

    def json(self):
        """The one object on its output, or None."""
        try:
            return json.loads(self.out)
        except ValueError:
            return None

    def why(self):
        """What went wrong, in one line."""
        if self.late:
            return f"not done within {self.seconds:.0f} s"
        error = ((self.json() or {}).get("error") or {}).get("message")
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return f"exit status {self.status}: {error or ' | '.join(lines[-3:])}"


class Waiting:
    """A process that prepares itself and then waits for lines, and says what it did in lines that are objects."""

    def __init__(self, command, environment):
        if STOPPING.is_set():
            sys.exit("interrupted")
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment, start_new_session=True,
        )
        RUNNING.add(self.process)
        self.lines = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(json.loads(line))
        self.lines.put(None)

    def next(self, seconds):
        """What it says next; a ValueError says why it says nothing, a TimeoutError that it does not yet."""
        try:
            said = self.lines.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"not done within {seconds:.0f} s") from None
        if said is None:
            self.errors.seek(0)
            raise ValueError((self.errors.read().strip().splitlines() or ["ended without a word"])[-1])
        return said

    def tell(self, line=""):
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def go(self, seconds):
        self.tell()
        return self.next(seconds)

    def end(self):
        kill(self.process)
        self.process.wait()
        RUNNING.discard(self.process)
        self.process.stdin.close()
        self.errors.close()
