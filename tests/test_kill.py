"""kill -9 at random moments: what is left is whole, and the continued run ends with the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_files(tmp_path: Path, kills: int) -> None:
    driver = Path(__file__).with_name("kill_driver.py")
    command = [sys.executable, str(driver), str(tmp_path), str(kills), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["kills"] == kills
    assert outcome["unreadable"] == 0
    assert outcome["different"] == 0
    assert outcome["runs"] >= 2
    assert outcome["files"] > 20
