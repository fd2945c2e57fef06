"""The wheel: what is in it, and (slow) that it works in an empty environment."""

from __future__ import annotations

import email
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import robustknn

ROOT = Path(__file__).parent.parent
MOVED = ("pyproject.toml", "README.md", "LICENSE", "src", "tests", "benchmarks", "examples", "docs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: building leaves folders behind."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("left out: building without a network needs setuptools")
    copy, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
    for name in MOVED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, copy / name)
    if importlib.util.find_spec("build") is not None:
        command = ["build", "--wheel", "--no-isolation", "--outdir", str(dist), "."]
    else:
        command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(dist), "."]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=copy, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    (made,) = dist.iterdir()
    return made


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    version = robustknn.__version__
    assert wheel.name == f"robustknn-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
    info = f"robustknn-{version}.dist-info"
    source = ROOT / "src" / "robustknn"
    wanted = {p for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {n for n in held if not n.startswith(info)} == {p.relative_to(ROOT / "src").as_posix() for p in wanted}
    assert {"robustknn/py.typed", "robustknn/reports/templates/report.html.j2"} <= held
    assert {"robustknn/reports/templates/report.css", "robustknn/reports/templates/macros.html.j2"} <= held
    assert f"{info}/licenses/LICENSE" in held
    assert {n.split("/")[0] for n in held} == {"robustknn", info}
    assert wheel.stat().st_size < 1_000_000


def test_it_says_what_it_is(wheel: Path) -> None:
    info = f"robustknn-{robustknn.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as file:
        said = email.message_from_string(file.read(f"{info}/METADATA").decode())
        scripts = file.read(f"{info}/entry_points.txt").decode()
    assert (said["Name"], said["Version"]) == ("robustknn", robustknn.__version__)
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.11"
    assert "robustknn = robustknn.cli:main" in scripts
    needed = said.get_all("Requires-Dist", [])
    assert any(n.startswith("torch") for n in needed)
    # Neither a test tool nor the optional engine comes with the plain package.
    for name in ("pytest", "faiss", "mypy", "hypothesis", "threadpoolctl"):
        assert all("extra ==" in n for n in needed if n.startswith(name))
    assert said.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()  # type: ignore[union-attr]


@pytest.mark.slow
def test_it_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Needs the package index, or pip's cache of it."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=300)
    folder = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = folder / ("python.exe" if os.name == "nt" else "python")
    constraints = ROOT / "constraints.txt"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints, wheel]
    subprocess.run(install, check=True, timeout=3000, env=env)
    command = [folder / "robustknn", "demo", "--quick", "--out", tmp_path / "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=env, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "demo" / "summary.json").is_file()
    where = [python, "-c", "import robustknn, importlib.util as u; print(robustknn.__file__, u.find_spec('faiss'))"]
    told = subprocess.run(where, capture_output=True, text=True, check=True, timeout=300, env=env, cwd=tmp_path)
    place, faiss = told.stdout.split()
    assert Path(place).is_relative_to(tmp_path)
    assert faiss == "None"
    missing = [folder / "robustknn", "report", "nowhere"]
    done = subprocess.run(missing, capture_output=True, text=True, check=False, timeout=300, env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("robustknn: 'nowhere")
