"""Loads by Python's loaders, each in a process of its own: `tasks.py TOUCH`, with the library of scripts/compare/protocol.

It imports every loader once. For each line on standard input, a task as that library describes it, it forks: the child
says that it is ready, waits for a line, loads, touches every byte, and says what landed, as the library's `serve` does.
So a load is always the first of a fresh process, no import counts, and nobody waits for imports.

Loaders are generators of (name, part) for whole tensors in the order in which they come; `part(dim, rank, world)` gives
a rank's part in memory of its own, dense, as an engine would keep it.
"""

import ctypes
import hashlib
import json
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor

LOADERS = {}


def loader(function):
    LOADERS[function.__name__] = function
    return function


class Whole:
    """A tensor that came as a whole. `own` says that it is memory of its own: keeping it keeps nothing else."""

    def __init__(self, tensor, own):
        self.tensor, self.own = tensor, own

    def whole(self):
        return self.tensor

    def part(self, dim, rank, world):
        if dim is None:
            # The first rank may have it as it is.
            tensor, own, self.own = self.tensor, self.own, False
            return tensor if own else tensor.clone()
        size = self.tensor.shape[dim] // world
        return self.tensor.narrow(dim, rank * size, size).clone(memory_format=torch.contiguous_format)


class Slice:
    """A tensor of an open file, to be sliced. `own` says that what is read is memory of its own, not of a mapping."""

    def __init__(self, file, name, own):
        self.file, self.name, self.own = file, name, own

    def whole(self):
        return self.file.get_tensor(self.name)

    def part(self, dim, rank, world):
        if dim is None:
            return self.whole() if self.own else self.whole().clone()
        view = self.file.get_slice(self.name)
        size = view.get_shape()[dim] // world
        mine = slice(rank * size, (rank + 1) * size)
        return (view[mine] if dim == 0 else view[:, mine]).clone(memory_format=torch.contiguous_format)


@loader
def torch_load(task):
    tensors = torch.load(task["files"][0], map_location="cpu", weights_only=True)
    for name in list(tensors):
        yield name, Whole(tensors.pop(name), own=True)


@loader
def torch_load_mmap(task):
    tensors = torch.load(task["files"][0], map_location="cpu", weights_only=True, mmap=True)
    for name, tensor in tensors.items():
        yield name, Whole(tensor, own=False)


def by_safetensors(task, backend):
    from safetensors import safe_open
    from safetensors.torch import load_file

    own = backend == "pread"
    for path in task["files"]:
        if task["world"] == 1 and not task["first"]:
            for name, tensor in load_file(path, backend=backend).items():
                yield name, Whole(tensor, own)
        else:
            with safe_open(path, framework="pt", backend=backend) as file:
                for name in file.keys():
                    yield name, Slice(file, name, own)


@loader
def safetensors_mapped(task):
    yield from by_safetensors(task, "mmap")


@loader
def safetensors_copied(task):
    """As engines do that must not depend on the file: mapped, then copied tensor by tensor."""
    for name, tensor in by_safetensors(task, "mmap"):
        yield name, Whole(tensor.whole().clone(), own=True)


@loader
def safetensors_pread(task):
    yield from by_safetensors(task, "pread")


def by_fastsafetensors(task, direct):
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    os.environ["FASTSAFETENSORS_ODIRECT"] = direct
    loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
    loader.add_filenames({0: task["files"]})
    buffers = loader.copy_files_to_device()
    for name in loader.get_keys():
        # Views of the buffers of whole files.
        yield name, Whole(buffers.get_tensor(name), own=False)
    if task["world"] > 1:
        buffers.close()
        loader.close()
    else:
        KEPT.extend((loader, buffers))


@loader
def fastsafetensors(task):
    yield from by_fastsafetensors(task, "0")


@loader
def fastsafetensors_direct(task):
    yield from by_fastsafetensors(task, "1")


@loader
def runai_streamer(task):
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        # What is cut at once may lie in buffers that are used again.
        whole = task["world"] == 1
        streamer.stream_files(task["files"], owned=whole)
        for name, tensor in streamer.get_tensors():
            yield name, Whole(tensor, own=whole)


@loader
def tensorizer(task):
    from tensorizer import TensorDeserializer

    # Only a lazy one hands out a tensor before it has read all.
    file = TensorDeserializer(task["files"][0], device="cpu", lazy_load=task["first"])
    for name in list(file.keys()):
        yield name, Whole(file[name].detach(), own=True)
    KEPT.append(file)


# What tensors are views of.
KEPT = []


def load(task):
    """The tensors that were asked for: (rank, name, tensor)."""
    source = LOADERS[task["loader"]](task)
    KEPT.append(source)
    landed = []
    for name, part in source:
        if task["world"] == 1:
            landed.append((0, name, part.whole()))
        else:
            dim = task["cuts"].get(name)
            landed += [(rank, name, part.part(dim, rank, task["world"])) for rank in task["ranks"]]
        if task["first"]:
            break
    return landed


def serve(task, library):
    """What the child does, as `serve` of scripts/compare/protocol."""
    say({"ready": True, "pid": os.getpid()})
    if not sys.stdin.readline():
        return
    start, worked = time.monotonic(), cpu_seconds()
    landed = load(task)
    load_seconds = time.monotonic() - start
    total = touch([tensor for _, _, tensor in landed], library) if task["touch"] else None
    seconds = time.monotonic() - start
    worked = cpu_seconds() - worked
    say({
        "seconds": seconds, "load_seconds": load_seconds, "cpu_seconds": worked,
        "bytes": sum(tensor.nbytes for _, _, tensor in landed), "tensors": len(landed), "sum": total,
        "digests": digests(landed) if task["verify"] else None,
    })


def touch(tensors, library):
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(f"a view of shape {list(tensor.shape)} was handed out")
    addresses = (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
    lengths = (ctypes.c_size_t * len(tensors))(*[tensor.nbytes for tensor in tensors])
    return library.compare_touch(addresses, lengths, len(tensors))


def digests(landed):
    def line(part):
        rank, name, tensor = part
        data = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        return rank, f"{name} [{','.join(map(str, tensor.shape))}] {hashlib.sha256(data).hexdigest()}\n"

    lines = {}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for rank, text in pool.map(line, landed):
            lines.setdefault(rank, []).append(text)
    return {rank: hashlib.sha256("".join(sorted(those)).encode()).hexdigest() for rank, those in lines.items()}


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def say(what):
    print(json.dumps(what), flush=True)


def main():
    library = ctypes.CDLL(sys.argv[1])
    library.compare_touch.restype = ctypes.c_uint64
    library.compare_touch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    say({"imported": True})
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            try:
                serve(json.loads(line), library)
            except Exception as error:
                say({"failed": f"{type(error).__name__}: {error}"})
            finally:
                # Nobody waits for memory to be given back.
                os._exit(0)
        _, status = os.waitpid(child, 0)
        say({"gone": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    # Whoever has not been imported now will be imported in a child's time.
    import fastsafetensors as _
    import runai_model_streamer as _
    import safetensors.torch as _
    import tensorizer as _
    import torch

    main()
