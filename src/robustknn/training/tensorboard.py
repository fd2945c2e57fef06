"""The epochs of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robustknn.errors import needs, reason
from robustknn.store import StorageError
from robustknn.training.checkpoints import EpochRecord


class TensorBoard:
    """Writes every epoch's figures as scalars.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        with needs("tensorboard", "tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._make: Any = SummaryWriter
        self._folder = folder
        self._writer: Any = None

    @contextmanager
    def after(self, epochs: int) -> Iterator[None]:
        """Open the log; what an interrupted run wrote of later epochs is passed over."""
        try:
            self._writer = self._make(str(self._folder), purge_step=epochs + 1)
        except OSError as error:
            raise StorageError(f"cannot write {str(self._folder)!r}: {reason(error)}.") from error
        try:
            yield
        finally:
            self._writer.close()

    def write(self, record: EpochRecord) -> None:
        """One epoch."""
        for name, value in record.row().items():
            if name != "epoch" and value is not None:
                self._writer.add_scalar(name, value, record.epoch)
        self._writer.flush()
