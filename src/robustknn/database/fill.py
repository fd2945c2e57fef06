"""Making the blocks that a database lacks, and writing them: the one place that changes its arrays."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from robustknn import store
from robustknn.batching import Samples
from robustknn.checks import check_labels
from robustknn.database.arrays import Writer, array_file, writing
from robustknn.database.extract import Executor, Rows
from robustknn.database.layout import BLOCKS, Block, Description, Part, Settings, ledger_file, note, noted
from robustknn.database.local import local_executor
from robustknn.datasets.sources import describe
from robustknn.errors import InputError, IntegrityError, ResumeError
from robustknn.features import FeatureExtractor
from robustknn.progress import Progress, Silent


def fill(
    folder: Path,
    features: FeatureExtractor,
    source: Samples,
    n_classes: int | None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
    new: bool = False,
) -> None:
    """Make the blocks of a source that a database lacks.

    Args:
        features: the extractor of the database.
        n_classes: see `classes_of`.
        new: whether the source may be one that the database does not know yet; it then becomes its last part.

    Raises:
        ResumeError: another source than those known; another process is writing.
    """
    with writing(folder):
        description = Description.read(folder)
        described = describe(source)
        part = next((p for p in description.parts if same_source(p.source, described)), None)
        if part is None:
            if not new:
                raise ResumeError(
                    f"the database in {str(folder)!r} was made of other samples ({_named(description.parts[0])}); add "
                    "these with `robustknn index add`, or choose another folder."
                )
            description = _extended(folder, description, described, classes_of(source, description.settings, n_classes))
            part = description.parts[-1]
        _make(folder, description, part, features, source, executor or local_executor(), progress or Silent())


def _extended(folder: Path, description: Description, described: dict[str, Any], n_classes: int) -> Description:
    """The description with a further part, written."""
    last = description.parts[-1]
    if any(noted(folder, block) is None for block in description.blocks([last])):
        raise ResumeError(
            f"the database in {str(folder)!r} is not finished ({_named(last)}); finish that first with its own source, "
            "or drop what was begun with --drop-unfinished."
        )
    payload_classes = last.n_classes if description.settings.labels == "payload" else n_classes
    made = description.with_part(described, payload_classes)
    made.write(folder)
    return made


def drop_unfinished(folder: Path) -> None:
    """Take the last part back when its blocks are not all done; InputError when there is nothing to take back."""
    with writing(folder):
        description = Description.read(folder)
        blocks = description.blocks([description.parts[-1]])
        if all(noted(folder, block) is not None for block in blocks):
            raise InputError(f"every block of the database in {str(folder)!r} is done; there is nothing to drop.")
        if len(description.parts) == 1:
            raise InputError(f"nothing of the database in {str(folder)!r} was finished; remove the folder itself.")
        with store.disk("write", folder):
            # First the ledger: a note left behind would be taken for one of what is added next.
            for block in blocks:
                ledger_file(folder, block).unlink(missing_ok=True)
            if (folder / BLOCKS).is_dir():
                store.sync_directory(folder / BLOCKS)
        replace(description, parts=description.parts[:-1]).write(folder)


def _make(
    folder: Path,
    description: Description,
    part: Part,
    features: FeatureExtractor,
    source: Samples,
    executor: Executor,
    progress: Progress,
) -> None:
    done = {block for block in description.blocks() if noted(folder, block) is not None}
    _check_arrays(folder, description, max((block.start + block.rows for block in done), default=0))
    todo = [block for block in part.blocks(description.settings.block_rows) if block not in done]
    if not todo:
        return
    progress.start("making references", part.rows, part.rows - sum(block.rows for block in todo))
    try:
        given = executor(features, source, todo, description.settings, part.start)
        with closing(_each_once(given, todo)) as made, Writer(folder, description.arrays, description.rows) as writer:
            for block, rows in made:
                note(folder, block, writer.write(block, rows))
                progress.advance(block.rows)
    finally:
        progress.stop()


def _check_arrays(folder: Path, description: Description, rows: int) -> None:
    """IntegrityError where an array lost some of its first rows, which are done: the writer would make them zeros."""
    if not rows:
        return
    for name, array in description.arrays.items():
        file = array_file(folder, name)
        try:
            held = store.load_array(file, mapped=True, rows=rows).numpy()
            right = (held.dtype.str, held.shape[1:]) == (array.dtype, tuple(array.row))
        except IntegrityError:
            right = False
        if not right:
            raise IntegrityError(
                f"{str(file)!r} is missing, truncated or altered; remove {str(folder / BLOCKS)!r} and run the same "
                "command again, which makes all blocks anew."
            )


def _each_once(made: Iterator[tuple[Block, Rows]], todo: list[Block]) -> Generator[tuple[Block, Rows]]:
    """What an executor gives, as long as it gives what was asked for."""
    left = set(todo)
    try:
        for block, rows in made:
            if block not in left:
                raise InputError(f"the executor gave block {block.number}, which was not asked for or given already.")
            left.remove(block)
            yield block, rows
    finally:
        if isinstance(made, Generator):  # a disk that is full stops the others' work too
            made.close()
    if left:
        raise InputError(f"the executor did not give {len(left)} of the {len(todo)} blocks it was asked for.")


def same_source(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two descriptions are of the same samples, wherever they lie."""
    return {k: v for k, v in a.items() if k != "path"} == {k: v for k, v in b.items() if k != "path"}


def classes_of(source: Samples, settings: Settings, n_classes: int | None) -> int:
    """The number of classes that the labels of a source speak of.

    Args:
        n_classes: how many there are; None takes the largest label plus one.

    Raises:
        InputError: labels are wanted and there are none, or they are not in range.
    """
    if settings.labels == "payload":
        return n_classes or 0
    if source.labels is None:
        raise InputError(
            "the samples come without labels; let the network name them: labels='payload' (--labels payload)."
        )
    labels = check_labels(source.labels, len(source), n_classes, "the list of labels")
    return n_classes or int(labels.max()) + 1


def _named(part: Part) -> str:
    return f"{part.source.get('path', part.source['name'])}, {part.rows} rows"
