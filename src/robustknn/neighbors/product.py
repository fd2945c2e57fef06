"""The matrix product of a search: its shape, its memory and its precision."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# A product is cheapest when its columns fill the vector registers.
QUERY_MULTIPLE = 16
# Held while a product runs with settings that another thread's product would have to change.
_SETTINGS = threading.RLock()


def width_of(queries: int) -> int:
    """How many columns to multiply for so many queries: a power of two when few, else whole registers."""
    if queries <= QUERY_MULTIPLE // 2:
        return max(2, 1 << (queries - 1).bit_length())
    return -(-queries // QUERY_MULTIPLE) * QUERY_MULTIPLE


class _Scratch(threading.local):
    """The buffer for scores, one a thread, kept between searches.

    Fresh memory of this size costs a page fault every 4 KiB: a fifth of a search was spent on them.
    """

    kept: Tensor | None = None

    @contextmanager
    def lend(self, rows: int, width: int, like: Tensor) -> Iterator[Tensor]:
        buffer, self.kept = self.kept, None
        fits = buffer is not None and (buffer.dtype, buffer.device) == (like.dtype, like.device)
        if buffer is None or not fits or not rows * width <= buffer.numel() <= 4 * rows * width:
            with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside it
                buffer = torch.empty(rows * width, dtype=like.dtype, device=like.device)
        try:
            yield buffer[: rows * width].view(rows, width)
        finally:
            self.kept = buffer if buffer.device.type == "cpu" else None


SCRATCH = _Scratch()


def product(vectors: Tensor, queries: Tensor, bias: Tensor | None, out: Tensor, precision: str) -> None:
    """⟨r, q⟩ + bias of r for vectors (n, D) and queries (B, D), into `out` (n, B).

    The precision holds whatever the process has set: by "medium" a float32 product would be one of bfloat16.
    """
    with _products_in(precision):
        if bias is None:
            torch.mm(vectors, queries.T, out=out)
        else:
            torch.addmm(bias[:, None], vectors, queries.T, out=out)


@contextmanager
def _products_in(precision: str) -> Iterator[None]:
    """Products of float32 numbers that round nothing before multiplying, or to bfloat16, for this block only.

    The settings are the whole process's. Usually they are right already and are not touched.
    """
    rounded = precision == "bfloat16"
    cuda: Any = torch.backends.cuda.matmul
    if not hasattr(cuda, "fp32_precision"):  # before torch 2.9
        wanted = "medium" if rounded else "highest"
        with _SETTINGS if torch.get_float32_matmul_precision() != wanted else nullcontext():
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(wanted)
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
        return
    # Reading the older setting fails once a process has used this newer one; the newer covers both.
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if not rounded and {cpu.fp32_precision, cuda.fp32_precision} <= {"none", "ieee"}:
        yield
        return
    with _SETTINGS:
        settings = cpu.fp32_precision, cuda.fp32_precision
        cpu.fp32_precision, cuda.fp32_precision = ("bf16", "tf32") if rounded else ("ieee", "ieee")
        try:
            yield
        finally:
            cpu.fp32_precision, cuda.fp32_precision = settings
