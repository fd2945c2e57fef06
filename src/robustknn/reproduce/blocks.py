"""Long work over many samples, in blocks that survive a kill: each block is a file that counts once it is whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from robustknn import store
from robustknn.errors import IntegrityError
from robustknn.progress import Progress


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process works on a folder, and work on it alone; a killed process lets go."""
    with ExitStack() as stack:
        if os.name != "nt":
            import fcntl

            with store.disk("write", folder):
                folder.parent.mkdir(parents=True, exist_ok=True)
                handle = stack.enter_context((folder.parent / f".{folder.name}.lock").open("wb"))
                fcntl.lockf(handle, fcntl.LOCK_EX)
        yield


def by_block(
    folder: Path,
    n: int,
    size: int,
    measure: Callable[[Tensor], Mapping[str, Tensor]],
    progress: Progress,
    what: str,
) -> dict[str, Tensor]:
    """Measure n samples block by block; blocks in the folder are read instead.

    Args:
        folder: of this work alone; its name (see `Bench.shared`) or its place must say what the work is.
        measure: positions (B,) → named tensors with B rows each, the same for any block they are in.
        what: for the progress.

    Returns:
        The tensors of all samples, in order.

    Raises:
        IntegrityError: a block is altered or of another size; the sentence names the file.
    """
    blocks = torch.arange(n).split(size)
    with alone(folder):
        missing = [block for block in blocks if not seal_of(folder, block).exists()]
        progress.start(what, n, n - sum(len(block) for block in missing))
        try:
            for block in missing:
                made = {name: value.detach().cpu() for name, value in measure(block).items()}
                file = seal_of(folder, block).with_suffix(".safetensors")
                store.save_tensors(file, made)
                store.write_sealed(seal_of(folder, block), {"rows": len(block), "tensors": store.sha256_file(file)})
                progress.advance(len(block))
        finally:
            progress.stop()
    parts = [_read(folder, block) for block in blocks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def left(folder: Path, n: int, size: int) -> float:
    """The share of the samples that has no whole block yet."""
    missing = [block for block in torch.arange(n).split(size) if not seal_of(folder, block).exists()]
    return sum(len(block) for block in missing) / n


def seal_of(folder: Path, block: Tensor) -> Path:
    """The file that makes a block count."""
    return folder / f"{int(block[0]):08d}-{int(block[-1]):08d}.json"


def _read(folder: Path, block: Tensor) -> dict[str, Tensor]:
    seal = seal_of(folder, block)
    held, file = store.read_sealed(seal), seal.with_suffix(".safetensors")
    if held.get("rows") != len(block) or not file.is_file() or store.sha256_file(file) != held.get("tensors"):
        raise IntegrityError(f"{str(file)!r} is missing or altered; remove it and {seal.name!r} to measure it again.")
    return store.load_tensors(file)
