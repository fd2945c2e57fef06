"""Every tutorial does what it prints: its blocks are run in their order, in an empty folder, and give what is shown.

Of a page, as it stands: a Python block whose first line is `# NAME.py` is that file; any other runs, in the names that
those before it left; `robustknn …` runs as typed. A `text` block is what the block above it printed: of a Python block
all of it, of commands some lines of it. Words must agree, numbers nearly: training does not give the same weights on
every processor. A block under `<!-- not run: … -->` is shown and not run.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command import succeed

from robustknn import registry

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [*sorted(page for page in (DOCS / "tutorials").glob("*.md") if page.name != "README.md"), DOCS / "report.md"]
BLOCK = re.compile(
    r"^(?P<skip><!-- not run: .+ -->\n+)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
NEAR = 0.1
"""How far a printed share may be from the page's; of 100 samples the 95 % interval is as wide."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that count, in their order."""
    text = page.read_text(encoding="utf-8")
    found = [m for m in BLOCK.finditer(text) if not m["skip"]]
    return [Block(m["language"], m["text"], text[: m.start("text")].count("\n")) for m in found]


def with_output(found: list[Block]) -> list[tuple[Block, list[str]]]:
    """Every block that runs, with the lines that the page shows as its output."""
    pairs: list[tuple[Block, list[str]]] = []
    for block in found:
        if block.language == "text":
            pairs[-1][1].extend(block.text.splitlines())
        else:
            pairs.append((block, []))
    return pairs


def near(shown: str, printed: str) -> bool:
    """Whether two lines have the same words, and numbers that differ as training does: shares by `NEAR`."""
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(abs(float(a) - float(b)) <= NEAR * (100 if float(a) > 1 else 1) for a, b in pairs)


def run_python(block: Block, page: Path, names: dict[str, Any]) -> str:
    if (file := re.match(r"# (\w+\.py)\n", block.text)) is not None:
        Path(file[1]).write_text(block.text, encoding="utf-8")
        return ""
    out = io.StringIO()
    with redirect_stdout(out):
        # Lines of an error are those of the page.
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    return out.getvalue()


def run_commands(block: Block) -> str:
    lines = block.text.replace("\\\n", " ").splitlines()
    return "".join(succeed(*shlex.split(line, comments=True)[1:]) for line in lines if line.startswith("robustknn "))


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a tutorial registers is forgotten again; it works in a folder of its own, from random numbers of its own."""
    for kind in registry.ALL.values():
        list(kind)  # loads the built-in entries
        monkeypatch.setattr(kind, "_entries", dict(kind._entries))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_does_what_it_prints(page: Path) -> None:
    for package in {"transformers", "faiss"} & set(re.findall(r"(?m)^(?:from|import) (\w+)", page.read_text("utf-8"))):
        pytest.importorskip(package, reason=f"{page.name} needs {package}: pip install {package}", exc_type=Exception)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block, shown in with_output(blocks(page)):
        where = f"{page.name}:{block.line}"
        python = block.language == "python"
        printed = (run_python(block, page, names) if python else run_commands(block)).splitlines()
        assert not python or len(shown) == len(printed), f"{where} prints {printed}"
        for i, line in enumerate(shown):
            said = printed[i : i + 1] if python else printed
            assert any(near(line, one) for one in said), f"{where} prints no {line!r}, but {said}"


def test_there_are_tutorials_and_they_run_something() -> None:
    assert {page.stem for page in PAGES} >= {"embedding", "attack", "harden"}
    for page in PAGES:
        languages = [block.language for block in blocks(page)]
        assert languages.count("python") >= 1, page.name
        assert "text" in languages, page.name


def test_what_is_near() -> None:
    assert near("eps 0.03: 0.41 stay right", "eps 0.03: 0.48 stay right")
    assert not near("eps 0.03: 0.41 stay right", "eps 0.03: 0.58 stay right")
    assert not near("eps 0.03: 0.41 stay right", "eps 0.03: 0.41 go wrong")
    assert near("worst case 17.6 %", "worst case  9.0 %")
    assert not near("worst case 17.6 %", "worst case 37.6 %")
    assert not near("a 1.0", "a 1.0 2.0")
