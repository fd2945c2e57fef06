"""Building on one machine: other processes read and decode, this one runs the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robustknn.batching import Samples
from robustknn.checks import check_whole
from robustknn.database.extract import Executor, Rows, extract, extract_block, labels_of, pieces
from robustknn.database.layout import Block, Settings
from robustknn.errors import Carried, RobustKNNError
from robustknn.features import FeatureExtractor


def local_executor(workers: int = 0) -> Executor:
    """Blocks made on this machine, in order.

    Args:
        workers: processes that read and decode the samples while the network runs; 0 reads them in between.
    """
    workers = check_whole(workers, "workers", 0)

    def run(
        features: FeatureExtractor, source: Samples, todo: Sequence[Block], settings: Settings, offset: int
    ) -> Iterator[tuple[Block, Rows]]:
        if not workers:
            for block in todo:
                yield block, extract_block(features, source, block, settings, offset)
            return
        todo = sorted(todo, key=lambda block: block.number)
        batches = _Batches(source, todo, settings, offset)
        read = _inputs(DataLoader(batches, batch_size=None, num_workers=workers))
        for block in todo:
            positions = pieces(block, settings, offset)
            labels = labels_of(source, positions, settings)
            yield block, extract(features, islice(read, len(positions)), labels, settings, block)

    return run


class _Batches(Dataset[Any]):
    """Item i is the i-th batch of samples of some blocks, or why it could not be read."""

    def __init__(self, source: Samples, blocks: Sequence[Block], settings: Settings, offset: int) -> None:
        self._source, self._blocks, self._settings, self._offset = source, blocks, settings, offset
        self._each = -(-settings.block_rows // settings.batch_size)

    def __len__(self) -> int:
        last = len(pieces(self._blocks[-1], self._settings))  # it alone may be shorter
        return self._each * (len(self._blocks) - 1) + last

    def __getitem__(self, place: int) -> Tensor | Carried:
        block, piece = divmod(place, self._each)
        try:
            return self._source.batch(pieces(self._blocks[block], self._settings, self._offset)[piece])
        except RobustKNNError as error:
            return Carried.of(error)


def _inputs(loader: DataLoader[Any]) -> Iterator[Tensor]:
    try:
        for batch in loader:
            if isinstance(batch, Carried):
                raise batch.error()
            yield batch
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
            raise
        raise RobustKNNError(
            "a process that reads samples died (out of memory?); what was finished is kept, run the same command "
            "again with fewer workers."
        ) from error
