"""How long importing the library takes beside importing torch."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.record import Figure, Result
from benchmarks.timing import Task, against

BOUND = 1.2
WHAT = (
    "Wall time of `python -c` with each import in a new process, in units of `import torch`, in turn. The library's "
    "names are imported when first used, so that the package alone, which the bound is for, costs next to nothing. "
    "Every public name is measured too: that is torch, pydantic, scikit-learn's base and ourselves."
)


def run(quick: bool) -> Result:
    """Measure the package alone and all its names."""
    import robustknn

    repeats = 1 if quick else 15
    names = [name for name in robustknn.__all__ if not name.startswith("_")]
    package, everything = "import robustknn", "from robustknn import every public name"
    cases = {package: python(package), everything: python(f"from robustknn import {', '.join(names)}")}
    found = against(python("import torch"), cases, repeats, time.perf_counter)
    return Result(WHAT, repeats, [Figure.of(package, found[package], BOUND), Figure.of(everything, found[everything])])


def python(statement: str) -> Task:
    """A new interpreter that runs a statement."""
    return lambda: subprocess.run([sys.executable, "-c", statement], check=True)
