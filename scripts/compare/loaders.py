"""One load by one loader in this process: `loaders.py NAME DEVICE FILE...`.

Prepares itself (imports, the device's context), prints how long that took, waits for a line, loads, waits until all of
it is on the device, and prints how long and what landed. The caller decides when it is alone on the machine.
"""

import json
import os
import sys
import time
from importlib.metadata import version


def torch_load(files, device):
    import torch

    # A checkpoint of several files is one dictionary in a single pickle here.
    return lambda: torch.load(files[0], map_location=device, weights_only=True)


def safetensors_torch(files, device):
    from safetensors.torch import load_file

    return lambda: {name: tensor for file in files for name, tensor in load_file(file, device=device).items()}


def fastsafetensors(files, device):
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    def load():
        # Without cuFile, as on most machines. The tensors are views of buffers that `loader` and `buffers` keep.
        loader = SafeTensorsFileLoader(SingleGroup(), device=device, nogds=True)
        loader.add_filenames({0: files})
        buffers = loader.copy_files_to_device()
        tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
        return Kept(tensors, loader, buffers)

    return load


def instanttensor(files, device):
    from instanttensor import safe_open

    def load():
        with safe_open(files, framework="pt", device=device) as file:
            return dict(file.tensors())

    return load


def runai_model_streamer(files, device):
    from runai_model_streamer import SafetensorsStreamer

    def load():
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files, device=device)
            # Some versions lend views of buffers that they use again.
            return {name: tensor.clone() for name, tensor in streamer.get_tensors()}

    return load


def h2d(_, device):
    """No loader: copies from pinned memory, the ceiling of all of them."""
    import torch

    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)

    def copy():
        rates = []
        for _ in range(8):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            rates.append(source.numel() / begin.elapsed_time(end) / 1e6)
        # The first copies may find the link asleep.
        print(json.dumps({"gb_per_s": max(rates)}), flush=True)
        return {}

    return copy


def pickle(files, _):
    """No loader either: writes the tensors of all but the first file into that one, as torch.save does."""
    import torch

    def save():
        tensors = safetensors_torch(files[1:], "cpu")()
        torch.save(tensors, files[0])
        with open(files[0], "rb") as file:
            os.fsync(file.fileno())
        return {}

    return save


def tensors(files, _):
    """And this one as tensorizer does."""
    from tensorizer import TensorSerializer

    def save():
        serializer = TensorSerializer(files[0])
        serializer.write_state_dict(safetensors_torch(files[1:], "cpu")())
        serializer.close()
        with open(files[0], "rb") as file:
            os.fsync(file.fileno())
        return {}

    return save


class Kept(dict):
    """Tensors with what they are views of."""

    def __init__(self, tensors, *kept):
        super().__init__(tensors)
        self.kept = kept


RIVALS = {
    loader.__name__: loader
    for loader in (torch_load, safetensors_torch, fastsafetensors, instanttensor, runai_model_streamer)
}
OTHERS = {"h2d": h2d, "pickle": pickle, "tensors": tensors}


def main():
    name, device, *files = sys.argv[1:]
    start = time.monotonic()
    import torch

    load = (RIVALS | OTHERS)[name](files, device)
    imported = time.monotonic()
    if device.startswith("cuda"):
        torch.cuda.init()
        torch.empty(1, device=device)
        torch.cuda.synchronize()
    # torch_load is torch, safetensors_torch is safetensors, and the others are called what they are.
    package = name.removesuffix("_load").removesuffix("_torch").replace("_", "-")
    ready = {
        "import_seconds": imported - start,
        "context_seconds": time.monotonic() - imported,
        "package": package,
        "version": version(package) if name in RIVALS else torch.__version__,
    }
    print(json.dumps(ready), flush=True)
    sys.stdin.readline()

    start = time.monotonic()
    tensors = load()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.monotonic() - start

    # Sums of words: equal for equal bytes, whoever loaded them. They also prove that every byte is there to be read.
    total = sum(int(tensor.view(torch.int16).sum(dtype=torch.int64)) for tensor in tensors.values())
    landed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    elsewhere = sorted({str(tensor.device) for tensor in tensors.values()} - {device})
    result = {"seconds": seconds, "bytes": landed, "tensors": len(tensors), "sum": total, "elsewhere": elsewhere}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
