"""What long measurements keep: networks, rows that are done, and a record of them all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.record import cpu, versions
from robustknn import store
from robustknn.attacks import Attack, Suite


def row(file: Path, measure: Callable[[], Any]) -> Any:
    """What a file holds, as JSON; measured and written, whole or not at all, where there is none."""
    if not file.exists():
        store.write_text(file, json.dumps(measure()))
    return json.loads(file.read_text())


def digest(attack: Attack) -> str:
    """What tells an attack's settings apart, for the name of a row's file: of a suite those of all of its parts."""
    return hashlib.sha256(repr(_settings(attack)).encode()).hexdigest()[:8]


def _settings(attack: Attack) -> Attack | dict[str, Any]:
    """An attack, or the parts of a suite, in which there may be suites."""
    return {n: _settings(part) for n, part in attack.members().items()} if isinstance(attack, Suite) else attack


def network(file: Path, model: nn.Module, fit: Callable[[], object]) -> nn.Module:
    """The model with the weights of a file; with those that `fit` gives it, which are written, where there is none."""
    if file.exists():
        model.load_state_dict(store.load_tensors(file))
    else:
        fit()
        store.save_tensors(file, dict(model.state_dict()))
    return model.eval()


def write_record(file: Path | None, **figures: Any) -> None:
    """The figures of a run with machine and versions, where a file is named."""
    if file is not None:
        store.write_text(file, json.dumps({**figures, "machine": cpu(), "versions": versions()}, indent=2) + "\n")
