"""The benchmarks run, time what they say, and mark a missed bound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import chromium, engines, figures, on_disk, report_page
from benchmarks.__main__ import HOMES, main
from benchmarks.mixture import Mixture
from benchmarks.record import Figure, read, row
from benchmarks.timing import against

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", HOMES)
def test_each_runs_and_writes_its_figures(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--quick", "--results", str(tmp_path)]) == 0
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["command"] == f"python -m benchmarks {name} --quick"
    assert content["figures"]
    assert all(f["value"] > 0 for f in content["figures"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("| benchmark |")
    assert len(printed) == 2 + len(content["figures"])


def test_a_quick_run_keeps_the_results_of_a_real_one() -> None:
    before = {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert main(["pgd_ce", "--quick"]) == 0
    assert before == {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").glob("*.json")}


def test_ratios_are_those_of_the_clock() -> None:
    now = 0.0

    def clock() -> float:
        return now

    def lasting(*seconds: float) -> object:
        queue = iter(seconds)

        def task() -> None:
            nonlocal now
            now += next(queue)

        return task

    base, case = lasting(9, 2, 4, 2), lasting(9, 4, 4, 6)  # the first of each does not count
    ratio = against(base, {"case": case}, 3, clock)["case"]  # type: ignore[arg-type, dict-item]
    assert ratio.pairs == [2, 1, 3]
    assert (ratio.least, ratio.median) == (4 / 2, 2)


@pytest.mark.parametrize(
    ("figure", "met", "said"),
    [
        (Figure("a", 1.2, bound=1.1), False, "| b | a | 1.20 |  | ≤ 1.10 | **MISSED** |"),
        (Figure("a", 1.05, 1.06, bound=1.1), True, "| b | a | 1.05 | 1.06 | ≤ 1.10 | yes |"),
        (Figure("a", 0.5, bound=0.55, at_least=True), False, "| b | a | 0.50 |  | ≥ 0.55 | **MISSED** |"),
        (Figure("a", 0.6), None, "| b | a | 0.60 |  |  |  |"),
    ],
)
def test_a_miss_is_marked(figure: Figure, met: bool | None, said: str) -> None:
    assert figure.met is met
    assert row("b", figure) == said


def test_the_search_engines_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    out = tmp_path / "e.json"
    sizes = ["--n", "3000", "--dim", "32", "--queries", "100", "--repeats", "1", "--k", "10"]
    assert engines.main([*sizes, "--out", str(out)]) == 0
    figures = {f["what"]: f["value"] for f in json.loads(out.read_text())["figures"]}
    for name in ("exact", *engines.KINDS, "plain faiss, ivf-flat", "scikit-learn brute force"):
        assert figures[f"{name}: recall"] > 0.9
        assert figures[f"batch 100: {name}, queries/s"] > 0
    assert figures["exact: recall"] == figures["exact: votes as exact"] == 1
    assert figures["ivf-flat: index, GB"] * 1e9 > 3000 * 4 * 32
    assert "| engines | ivf-pq: recall |" in capsys.readouterr().out


def test_lists_on_a_disk(tmp_path: Path) -> None:
    if not hasattr(pytest.importorskip("faiss"), "OnDiskInvertedLists"):
        pytest.skip("left out: faiss has none here")
    out, folder = tmp_path / "d.json", tmp_path / "folder"
    command = ["--folder", str(folder), "--n", "20000", "--dim", "16", "--queries", "60", "--out", str(out)]
    for kept in (["--keep"], []):  # the second finds what the first left
        assert on_disk.main([*command, *kept]) == 0
        figures = {f["what"]: f["value"] for f in json.loads(out.read_text())["figures"]}
        assert figures["recall"] > 0.9
        assert figures["votes as exact"] > 0.9
        assert sorted(p.name for p in folder.iterdir()) == (["index", "labels.npy", "vectors.npy"] if kept else [])


def test_the_generator_gives_the_same_rows_in_any_cut() -> None:
    whole, labels = Mixture(5, seed=3).rows(65_000, 2000)
    parts = [Mixture(5, seed=3).rows(65_000 + start, 500) for start in range(0, 2000, 500)]
    assert torch.equal(torch.cat([v for v, _ in parts]), whole)
    assert torch.equal(torch.cat([y for _, y in parts]), labels)
    assert not torch.equal(Mixture(5, seed=4).rows(65_000, 2000)[0], whole)
    assert not torch.equal(Mixture(5, seed=3).queries(2000), whole)


def test_the_report_is_opened_by_a_browser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install '.[dev]'")
    if chromium.program() is None:
        pytest.skip(f"{chromium.MISSING} to open a report")
    out = tmp_path / "report_page.json"
    assert report_page.main(["--n", "30", "--repeats", "2", "--out", str(out)]) == 0
    size, opened = read(out)
    assert 0.1 < size.value < 5
    assert len(opened.pairs) == 2
    assert capsys.readouterr().out.count("| report_page |") == 2


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["speed"])
    assert stopped.value.code == 2
    assert "there is no benchmark 'speed'; choose from pgd_ce" in capsys.readouterr().err


def test_the_committed_results_are_of_whole_runs_on_one_thread() -> None:
    for name in HOMES:
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        content = json.loads(path.read_text())
        assert content["threads"] == 1
        assert "--quick" not in content["command"]
        assert [f.met for f in read(path)] == [f["met"] for f in content["figures"]]


def test_the_figures_of_the_docs_are_those_of_the_kept_results(tmp_path: Path) -> None:
    assert figures.main(["--out", str(tmp_path)]) == 0
    drawn = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    kept = {file.name: file.read_text(encoding="utf-8") for file in figures.IMAGES.glob("certified-*.svg")}
    assert drawn.keys() == kept.keys()
    assert drawn == kept, "draw them again: python -m benchmarks.figures"
