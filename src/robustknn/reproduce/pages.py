"""The results pages, made of the committed records alone: a page a table, and a front page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from robustknn import store
from robustknn.errors import InputError
from robustknn.reports.words import plural
from robustknn.reproduce.experiment import PUBLISHED, WORST, Experiment, Place, experiments
from robustknn.reproduce.papers import note, printed
from robustknn.reproduce.published_weights import SOURCE, WEIGHTS
from robustknn.reproduce.record import read_record
from robustknn.reproduce.scenes_victim import suite_of

DATA, FIGURES = "data", "figures"
_MADE = "<!-- Made by `robustknn reproduce --pages`; edits are lost. -->"
Records = dict[str, list[dict[str, Any]]]


def write_pages(folder: Path) -> list[Path]:
    """Write every page and figure of a folder from the records in its `data/`; the paths of the pages.

    Raises:
        InputError: there is no such folder, or a record of an experiment that nobody registered.
        IntegrityError: a file there is no record.
    """
    made = pages_of(folder)
    for path, content in made.items():
        store.write_bytes(path, content)
    return [path for path in made if path.suffix == ".md"]


def pages_of(folder: Path) -> dict[Path, bytes]:
    """The content of every page and figure, by path."""
    if not (folder / DATA).is_dir():
        raise InputError(f"{str(folder)!r} has no folder {DATA!r} with records; name the folder above it.")
    records: Records = {entry.name: [] for entry in experiments}
    for path in sorted((folder / DATA).glob("*.json")):
        record = read_record(path)
        experiments.entry(record["experiment"])
        records[record["experiment"]].append(record)
    made: dict[Path, bytes] = {}
    for name, held in records.items():
        experiment: Experiment = experiments.create(name)
        charts = {id(record): experiment.draw(record) for record in held}
        for record in held:
            for chart in charts[id(record)]:
                stem = folder / FIGURES / f"{_stem(record)}-{chart.stem}"
                made[stem.with_name(stem.name + ".svg")] = chart.svg
                made[stem.with_name(stem.name + ".png")] = chart.png
        made[folder / f"{name}.md"] = _page(name, experiment, held, charts).encode()
    made[folder / "README.md"] = _front(records).encode()
    return made


def _stem(record: Mapping[str, Any]) -> str:
    return "{experiment}.{data}.{preset}".format(**record)


# ------------------------------------------------------------------------------------------- a page


def _page(name: str, experiment: Experiment, held: list[dict[str, Any]], charts: Mapping[int, Any]) -> str:
    lines = [_MADE, f"# {experiment.paper}, {experiment.table}", "", f"{experiment.title}.", ""]
    if general := note(name):
        lines += [general, ""]
    for data in experiment.data:
        own = sorted((r for r in held if r["data"] == data), key=lambda r: str(r["preset"]))
        for record in own:
            lines += [f"## {data}, preset {record['preset']}", "", *_table(record)]
            for chart in charts[id(record)]:
                at = f"{FIGURES}/{_stem(record)}-{chart.stem}"
                lines += [f"[![{chart.title}]({at}.png)]({at}.svg)", ""]
                lines += [chart.caption, ""] if chart.caption else []
        if not own:
            lines += [f"## {data}", "", "Not run.", ""]
            if theirs := printed(name, data):
                lines += [*_matrix(theirs, {place: f"({value})" for place, value in theirs.items()}), ""]
        if own and (said := note(name, data)):
            lines += [said, ""]
        for record in own:
            lines += _details(record)
    return "\n".join(lines).rstrip() + "\n"


def _table(record: Mapping[str, Any]) -> list[str]:
    """The numbers as the paper lays them out, ours first."""
    theirs = printed(record["experiment"], record["data"])
    places = {(r["row"], r["column"]): r for r in record["rows"]}
    shown = {place: _cell(r, theirs.get(place)) for place, r in places.items()}
    shown |= {place: f"not run ({value})" for place, value in theirs.items() if place not in shown}
    said = "Ours"
    said += f", mean ± standard deviation over seeds {', '.join(record['runs'])}" if len(record["runs"]) > 1 else ""
    said += "; in brackets what was published. " if theirs else ". "
    return [*_matrix(shown, shown), "", said + _sizes(record), ""]


def _sizes(record: Mapping[str, Any]) -> str:
    """Sample sizes by protocol, and which suite the worst case is: later commits may have more attacks in it."""
    parts = []
    for protocol in (PUBLISHED, WORST):
        sizes = sorted({r["n"] for r in record["rows"] if r["protocol"] == protocol})
        if sizes:
            commits = ", ".join(dict.fromkeys(run["commit"] or "unknown" for run in record["runs"].values()))
            by = f" (`{suite_of(record)}` of commit {commits})" if protocol == WORST else ""
            parts.append(f"{protocol}{by}: n = {', '.join(f'{n:,}' for n in sizes)}")
    said = "; ".join(parts)
    return f"{said[:1].upper()}{said[1:]}."


def _matrix(places: Iterable[tuple[str, str]], shown: Mapping[tuple[str, str], str]) -> list[str]:
    """A Markdown table; the worst case is its last column."""
    held = list(places)
    columns = sorted(dict.fromkeys(column for _, column in held), key=lambda column: column == WORST)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in dict.fromkeys(row for row, _ in held):
        lines.append(f"| {row} | " + " | ".join(shown.get((row, column), "") for column in columns) + " |")
    return lines


def _cell(row: Mapping[str, Any], theirs: str | None = None) -> str:
    spread = "" if row["sd"] is None else f" ± {_number(row['sd'], row['unit'])}"
    return f"{_number(row['mean'], row['unit'])}{spread}{'' if theirs is None else f' ({theirs})'}"


def _number(value: float, unit: str) -> str:
    return f"{value:.2f}" if unit in ("%", "points") else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _details(record: Mapping[str, Any]) -> list[str]:
    """Every number with interval and seeds, and how it was made."""
    seeds = list(record["runs"])
    lines = [f"<details markdown><summary>Every number, {record['data']}, preset {record['preset']}</summary>", ""]
    heads = ["measured", "unit", "published", "mean", "sd", "95 %", "n", *(f"seed {seed}" for seed in seeds)]
    lines += ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    theirs = printed(record["experiment"], record["data"])
    for r in record["rows"]:
        unit, low_high = r["unit"], r["interval"]
        cells = [f"{r['row']}, {r['column']}", unit, theirs.get((r["row"], r["column"]), "")]
        cells += [_number(r["mean"], unit), "" if r["sd"] is None else _number(r["sd"], unit)]
        cells += ["" if low_high is None else " – ".join(_number(end, unit) for end in low_high), f"{r['n']:,}"]
        cells += [_number(r["seeds"][s]["value"], unit) if s in r["seeds"] else "" for s in seeds]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for seed, run in record["runs"].items():
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        lines.append(
            f"* seed {seed}: `{run['command']}`, commit {run['commit'] or 'unknown'}, {versions}, "
            f"{run['machine']['device']} with {plural(run['machine']['threads'], 'thread')}, {_minutes(run['seconds'])}"
        )
        for network in run["networks"]:
            weights, right = network["sha256_weights"], 100 * network["test_accuracy"]
            lines.append(
                f"    * {network['network']}: {_origin(network['command'])}, right on {right:.2f} % of the test set, "
                f"weights sha256 `{weights}`"
            )
    return [*lines, "", "</details>", ""]


def _origin(command: str) -> str:
    """How a network was made: a command, or a file that others published."""
    return f"published weights `{command}`, of {SOURCE}" if command in WEIGHTS.values() else f"`{command}`"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds >= 60 else "less than a minute"


# ------------------------------------------------------------------------------------- the front page


_COLUMNS = (
    "| method | data set | clean | published protocol | printed in the paper "
    "| adaptive worst case | suite | n, worst case | page |",
    "|---|---|---:|---:|---:|---:|---|---:|---|",
)


def _front(records: Records) -> str:
    done, missing = [], []
    for name, held in records.items():
        experiment: Experiment = experiments.create(name)
        for method, places in experiment.front.items():
            for data in experiment.data:
                own = [r for r in held if r["data"] == data]
                done += [_line(name, method, places, data, record) for record in own]
                missing += [] if own else [_line(name, method, places, data, None)]
    lines = [
        _MADE,
        "# Results",
        "",
        "Every table and figure of the papers that can be run here, each by one command (`robustknn reproduce NAME`). "
        "The published protocol is the attack that the paper reports, and where its settings were not to be found "
        "the page says which are ours; the adaptive worst case attacks the classifier as it decides, sample by sample, "
        "by the suite that is named: `worst-case-fast` is the short one, and a longer one may leave less, as may the "
        "suite of a later commit than the one that the page names. Accuracies in %.",
        "",
    ]
    if done:
        lines += [*_COLUMNS, *done, ""]
    if missing:
        lines += ["<details markdown><summary>Not run yet</summary>", "", *_COLUMNS, *missing, "", "</details>", ""]
    lines += ["| page | paper | what it shows | run on |", "|---|---|---|---|"]
    for name, held in records.items():
        experiment = experiments.create(name)
        ran = ", ".join(f"{r['data']} ({r['preset']}, {plural(len(r['runs']), 'seed')})" for r in held) or "not run"
        lines.append(f"| [{name}]({name}.md) | {experiment.paper}, {experiment.table} | {experiment.title} | {ran} |")
    return "\n".join(lines) + "\n"


def _line(name: str, method: str, places: Sequence[Place], data: str, record: Mapping[str, Any] | None) -> str:
    """A line of the front table: clean, published protocol, worst case."""
    value = printed(name, data).get(places[1], "")
    if record is None:
        return f"| {method} | {data} | not run | not run | {value} | not run | | | [{name}]({name}.md) |"
    rows = {(r["row"], r["column"]): r for r in record["rows"]}
    found = [rows.get(place) for place in places]
    shown = ["not run" if r is None else _cell(r) for r in found]
    preset = "" if record["preset"] == "cpu" else f", {record['preset']}"
    n = "" if found[2] is None else f"{found[2]['n']:,}"
    by = "" if found[2] is None else f"`{suite_of(record)}`"
    line = f"| {method} | {data}{preset} | {shown[0]} | {shown[1]} | {value} | {shown[2]} | {by} | {n} "
    return f"{line}| [{name}]({name}.md) |"
