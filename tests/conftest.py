"""Shared fixtures: real data sets when ROBUSTKNN_DATA says where they are, one thread, no plots on screen."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)
# The same examples in every run, and no clock: CI machines are shared.
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")


def seed(name: str) -> None:
    torch.manual_seed(zlib.crc32(name.encode()))


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """What a fixture draws does not depend on the tests that ran before it in the same process."""
    seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """What a test draws without a seed of its own (the weights of a small network) is the same in every run."""
    seed(item.nodeid)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the real data sets; skips, and says so, when there is none."""
    where = os.environ.get("ROBUSTKNN_DATA")
    if not where or not Path(where).is_dir():
        pytest.skip("left out: needs the real data sets, set ROBUSTKNN_DATA to the folder that holds them")
    return Path(where)


@pytest.fixture(scope="session")
def cifar_root(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `cifar-10-batches-py`: the data root, or one unpacked from its packed form."""
    if (data_root / "cifar-10-batches-py").is_dir():
        return data_root
    script = data_root / "unpack_cifar10.py"
    if not script.is_file():
        pytest.skip("left out: ROBUSTKNN_DATA holds neither cifar-10-batches-py nor a script that unpacks it")
    root = tmp_path_factory.mktemp("cifar")
    batches = root / "cifar-10-batches-py"
    subprocess.run([sys.executable, str(script), str(data_root / "cifar10_packed"), str(batches)], check=True)
    return root


def pytest_report_header(config: pytest.Config) -> str:
    where = os.environ.get("ROBUSTKNN_DATA")
    return f"ROBUSTKNN_DATA: {where or 'not set, tests on real data sets are left out'}"
