"""What the README shows works: its Python runs as printed, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.main import get_command

from robustknn.cli.app import whole_app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [block for spoken, block in found if spoken == language]


def test_the_python_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    labels = torch.arange(120) % 3
    images = (0.6 * torch.rand(120, 1, 6, 6) + 0.4 * torch.rand(3, 1, 6, 6)[labels]).clamp(0, 1)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        embeddings = encoder(images[20:])
    here: dict[str, Any] = {"encoder": encoder, "embeddings": embeddings, "labels": labels[20:]}
    here |= {"x": images[:20], "y": labels[:20]}
    parts = blocks("python")
    assert len(parts) == 2
    for part in parts:
        exec(compile(part, "README.md", "exec"), here)
    assert here["robust"].dtype == torch.bool
    for name in ("report.html", "summary.json", "rows.parquet"):
        assert (tmp_path / "runs" / "mine" / name).stat().st_size > 100


def commands(page: Path) -> list[list[str]]:
    """The words of every whole `robustknn …` command of a page's blocks without a language, and of its shell blocks."""
    found = re.findall(r"^```(?:sh|bash)?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in found for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("robustknn ") and "…" not in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_parse(page: Path) -> None:
    for words in commands(page):
        command: Any = get_command(whole_app())
        while hasattr(command, "commands"):
            assert words[1] in command.commands, words
            command = command.commands[words.pop(1)]
        assert command.make_context(words[0], words[1:], resilient_parsing=False).params or not words[1:]


def test_every_command_is_shown_in_the_readme() -> None:
    group: Any = get_command(whole_app())
    assert {words[1] for words in commands(ROOT / "README.md")} == set(group.commands)


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"(?m)^make ([a-z-]+)|`make ([a-z-]+)`", page.read_text(encoding="utf-8")):
            assert f"\n{''.join(target)}:" in makefile, (page.name, target)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"(?m)^#+ (.+)$", target.read_text(encoding="utf-8"))
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, link


def table(page: Path) -> dict[tuple[str, str], list[str]]:
    """The first three figures of every method and data set of a page's tables of methods."""
    rows = re.findall(r"^\| ([^|]+) \| (mnist|fashion-mnist|cifar10) \|(.*)\|$", page.read_text("utf-8"), re.MULTILINE)
    return {(method, data): [cell.strip() for cell in rest.split("|")] for method, data, rest in rows}


def test_the_table_of_methods_has_the_figures_of_the_results() -> None:
    shown, held = table(ROOT / "README.md"), table(ROOT / "docs" / "results" / "README.md")
    assert len(shown) >= 5
    for place, cells in shown.items():
        clean, published, _, worst = held[place][:4]
        figures = [float(cell.split(" ±")[0]) for cell in (clean, published, worst)]
        assert [float(cell.strip("*")) for cell in cells] == pytest.approx(figures, abs=0.0501), place
