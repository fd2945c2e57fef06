"""Peak memory while references of four layers are made and searched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.record import Figure, Result

GB = 1e9
STATUS = Path("/proc/self/status")
BUDGET = 0.6
FACTOR = 1.3
DIM = 12544 + 6272 + 1152 + 10
WHAT = (
    "Peak resident memory of a process that reads N random 28×28 images into references of the MNIST CNN's four "
    "layers, makes a cosine DkNN (k = 75) of them and predicts 500 images, as a share of its bound: "
    f"{FACTOR} × the references' size + {BUDGET} GB. The {BUDGET} GB are for the interpreter, torch, the images, the "
    "activations of one batch of 256 and the buffers of a search (256 MB by default)."
)


def run(quick: bool) -> Result:
    """Measure once, in a process of its own."""
    n = 500 if quick else 15_000
    command = [sys.executable, "-m", "benchmarks.memory", str(n)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    before, peak = (int(word) / GB for word in done.stdout.split())
    size = n * DIM * 4 / GB
    figures = [
        Figure("peak / (1.3 × references + 0.6 GB)", peak / (FACTOR * size + BUDGET), bound=1.0),
        Figure("peak, GB", peak),
        Figure("references, GB", size),
        Figure("resident before (interpreter, torch, images), GB", before),
        Figure("(peak − resident before) / references", (peak - before) / size),
    ]
    return Result(WHAT, 1, figures, {"images": n, "predicted": 500})


def work(n: int) -> int:
    """Do what is measured; returns the memory in use before it."""
    from robustknn import DkNN, FeatureExtractor, ReferenceSet
    from robustknn.models import MnistCNN

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, images = MnistCNN(), torch.rand(n, 1, 28, 28)
    before = peak_memory()
    references = ReferenceSet.build(FeatureExtractor(net, net.feature_layers), (images, torch.arange(n) % 10))
    DkNN(references, 75, metric="cosine").predict(torch.rand(500, 1, 28, 28))
    return before


def anonymous_memory() -> int:
    """The memory in use now that no file stands behind, in bytes; 0 where the system does not tell."""
    return _told("RssAnon") if STATUS.is_file() else 0


def _told(name: str) -> int:
    """A size that Linux tells of this process, in bytes."""
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    if STATUS.is_file():  # what `resource` reports here includes the process that started this one
        return _told("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(work(int(sys.argv[1])), peak_memory())
