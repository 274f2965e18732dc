"""The same random weights in every form that a contender reads."""

import json
import shutil
import sys
from pathlib import Path

import checkpoint
from processes import Ran

HERE = Path(__file__).resolve().parent
SHARDS = 4
GPT2_LAYERS = 12
# Three copies of the model beside its shards, and GPT-2 twice.
COPIES, GPT2_BYTES = 4, 550_000_000
WRITE_SECONDS = 900


class Weights:
    """Files in a folder: a Llama-shaped model in four forms, GPT-2 in two. Made by whoever comes first."""

    def __init__(self, folder, size, gpt2_layers, environment):
        self.folder, self.expected = folder, {}
        manifest = folder / "weights.json"
        wanted = {"size": size, "gpt2_layers": gpt2_layers}
        made = json.loads(manifest.read_text()) if manifest.exists() else {}
        if made and made["wanted"] != wanted:
            sys.exit(f"{folder} holds weights of another size ({made['wanted']['size'] / 1e9:.2f} GB): remove it")
        if not made:
            made = {"wanted": wanted, **self.make(size, gpt2_layers, environment)}
            manifest.write_text(json.dumps(made))
        self.made = made

    def make(self, size, gpt2_layers, environment):
        needed = COPIES * size + 2 * GPT2_BYTES * gpt2_layers // GPT2_LAYERS
        self.folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.folder).free) < needed * 1.05:
            sys.exit(f"{self.folder} has room for {free / 1e9:.1f} GB, and the weights need {needed / 1e9:.1f}: see --dir, --size")
        print(f"writing {needed / 1e9:.1f} GB of weights into {self.folder}", flush=True)
        shapes = checkpoint.LLAMA_3_2_1B if size >= 1 << 30 else checkpoint.SMALL_LLAMA_OF_8
        llama = checkpoint.llama_of_size(self.folder / "llama", size, shapes, SHARDS)
        (self.folder / "one-file").mkdir(exist_ok=True)
        one_file = self.folder / "one-file/model.safetensors"
        checkpoint.join(self.shards(), one_file)
        gpt2_file = self.folder / "gpt2/model.safetensors"
        gpt2 = checkpoint.gpt2(gpt2_file, gpt2_layers)
        for form, files in [("pickle", [one_file]), ("tensors", [one_file]), ("pickle", [gpt2_file])]:
            out = files[0].with_suffix(SUFFIXES[form])
            ran = Ran([environment.python, HERE / "loaders.py", form, "cpu", out, *files], WRITE_SECONDS)
            if ran.status != 0 and form == "tensors":
                environment.left_out["tensorizer"] = f"its file was not written: {ran.why()}"
            elif ran.status != 0:
                sys.exit(f"{out} was not written: {ran.why()}")
        return {"llama": {**llama, "shards": len(self.shards())}, "gpt2": gpt2}

    def shards(self):
        return sorted(map(str, (self.folder / "llama").glob("*.safetensors")))

    def files(self, row, form):
        """What a loader of this form reads for a row."""
        if form == "safetensors" and row.model == "llama" and not row.one_file:
            return self.shards()
        folder = "gpt2" if row.model == "gpt2" else "one-file"
        return [str(self.folder / folder / "model") + SUFFIXES[form]]

    def model(self, row):
        """What is opened by a loader that opens checkpoints."""
        if row.model == "gpt2":
            return self.folder / "gpt2/model.safetensors"
        return self.folder / ("one-file/model.safetensors" if row.one_file else "llama")

    def cuts(self, row):
        return self.made["llama"]["cuts"] if row.world > 1 else {}

    def digests(self, row):
        """What each rank must hold, by the plainest way to read it."""
        key = (row.model, row.world, row.ranks)
        if key not in self.expected:
            files = self.files(row, "safetensors")
            self.expected[key] = checkpoint.digests(files, self.cuts(row), row.world, row.ranks)
        return self.expected[key]


SUFFIXES = {"safetensors": ".safetensors", "pickle": ".bin", "tensors": ".tensors"}
