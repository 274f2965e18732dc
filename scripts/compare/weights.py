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

    def __init__(self, folder, size, gpt2_layers):
        self.folder, self.expected = folder, {}
        self.wanted = {"size": size, "gpt2_layers": gpt2_layers}
        self.manifest = folder / "weights.json"
        self.made = json.loads(self.manifest.read_text()) if self.manifest.exists() else None
        if self.made and self.made["wanted"] != self.wanted:
            sys.exit(f"{folder} holds weights of another size ({self.made['wanted']['size'] / 1e9:.2f} GB): remove it")
        self.needed = COPIES * size + 2 * GPT2_BYTES * gpt2_layers // GPT2_LAYERS
        folder.mkdir(parents=True, exist_ok=True)
        if not self.made and (free := shutil.disk_usage(folder).free) < self.needed * 1.05:
            room = f"has room for {free / 1e9:.1f} GB, and the weights need {self.needed / 1e9:.1f}"
            sys.exit(f"{folder} {room}: see --dir, --size")

    def make(self, environment):
        """Writes what is not there yet."""
        if self.made:
            return
        print(f"writing {self.needed / 1e9:.1f} GB of weights into {self.folder}", flush=True)
        size = self.wanted["size"]
        shapes = checkpoint.LLAMA_3_2_1B if size >= 1 << 30 else checkpoint.SMALL_LLAMA_OF_8
        llama = checkpoint.llama_of_size(self.folder / "llama", size, shapes, SHARDS)
        (self.folder / "one-file").mkdir(exist_ok=True)
        one_file = self.folder / "one-file/model.safetensors"
        checkpoint.join(self.shards(), one_file)
        gpt2_file = self.folder / "gpt2/model.safetensors"
        gpt2 = checkpoint.gpt2(gpt2_file, self.wanted["gpt2_layers"])
        for form, files in [("pickle", [one_file]), ("tensors", [one_file]), ("pickle", [gpt2_file])]:
            out = files[0].with_suffix(SUFFIXES[form])
            ran = Ran([environment.python, HERE / "loaders.py", form, "cpu", out, *files], WRITE_SECONDS)
            if ran.status != 0 and form == "tensors":
                environment.left_out["tensorizer"] = f"its file was not written: {ran.why()}"
            elif ran.status != 0:
                sys.exit(f"{out} was not written: {ran.why()}")
        self.made = {"wanted": self.wanted, "llama": {**llama, "shards": len(self.shards())}, "gpt2": gpt2}
        self.manifest.write_text(json.dumps(self.made))

    def about(self):
        """What a record tells of them."""
        llama = {key: value for key, value in self.made["llama"].items() if key != "cuts"}
        return {"llama": llama, "gpt2": self.made["gpt2"]}

    def remove(self):
        """Only what is of its making: whatever else lies in a folder that was named stays."""
        for name in ("llama", "one-file", "gpt2"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.manifest.unlink(missing_ok=True)

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

    def landing(self, row):
        """Bytes of memory that the load of a row takes, of those who load all before they cut too; 2 MiB at least."""
        size = self.made[row.model]["bytes"]
        return max(2 << 20, size if len(row.ranks) == 1 else 2 * size)

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
