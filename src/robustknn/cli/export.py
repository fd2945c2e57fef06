"""Adversarial examples as files: exact tensors, 8-bit images, and a row each."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from torch import Tensor

from robustknn import store
from robustknn.evaluation import Cell, RunDirectory, finish
from robustknn.evaluation.rundir import CLEAN

COLUMNS = ("sample_id", "label", "clean_correct", "success", "prediction", "margin", "l2", "linf")


def export_examples(run: RunDirectory, out: Path) -> None:
    """Write `examples.safetensors`, `rows.csv` and, for images, `images/*.png` from a finished run."""
    summary = finish(run)
    (name,) = run.header["plan"]["classifier_names"]
    (attack,) = run.header["plan"]["attack_names"]
    cell = Cell(name, attack, float(run.header["plan"]["threat"]["eps"]))
    rows, attacked, before = run.rows(cell), run.tensors(cell), run.tensors(Cell(name, CLEAN))
    clean_x = before["x"][torch.isin(before["position"], attacked["position"])]
    ids = torch.from_numpy(rows["sample_id"])
    store.save_tensors(
        out / "examples.safetensors",
        {"x_adv": attacked["x"], "x": clean_x, "sample_id": ids, "label": torch.from_numpy(rows["label"])},
    )
    columns = [c for c in (*COLUMNS, "credibility") if c in rows]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*(rows[c].tolist() for c in columns), strict=True))
    store.write_text(out / "rows.csv", text.getvalue())
    pictures = _write_images(out / "images", ids, clean_x, attacked["x"])
    point = summary.classifiers[0].attacks[0]
    clean = summary.classifiers[0].clean_accuracy
    print(f"{point.n} examples: accuracy {clean:.3f} clean, {point.robust_accuracy:.3f} attacked")
    print(f"examples: {out / 'examples.safetensors'}\nrows: {out / 'rows.csv'}")
    if pictures:
        print(f"images: {out / 'images'} ({pictures} files, rounded to 8 bits)")


def _write_images(folder: Path, ids: Tensor, clean: Tensor, attacked: Tensor) -> int:
    """PNG files of the samples before and after, when they are images; how many were written."""
    if clean.ndim != 4 or clean.shape[1] not in (1, 3):
        return 0
    from PIL import Image

    for place, sample in enumerate(ids.tolist()):
        for kind, x in (("clean", clean[place]), ("attacked", attacked[place])):
            pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(2).numpy()
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "PNG")
            store.write_bytes(folder / f"{sample:06d}-{kind}.png", data.getvalue())
    return 2 * len(ids)
