"""Images from archives, folders, Hugging Face data sets and one's own function, against pixels that were put there."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from robustknn.datasets import Split, hugging_face, load, open_source, shards, write_shards
from robustknn.datasets.shards import shard_files
from robustknn.datasets.sources import Source, as_source, describe
from robustknn.errors import InputError, IntegrityError

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
TRUTH = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255


def png(place: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(PIXELS[place]).save(data, "PNG")
    return data.getvalue()


def archive(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def sentence(error: pytest.ExceptionInfo[Any]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text[-1] in ".?"
    return text


def everything(source: Source) -> Tensor:
    return source.batch(torch.arange(len(source)))


# ------------------------------------------------------------------------------------------- archives


def test_what_is_written_is_read(tmp_path: Path) -> None:
    split = load("digits").test
    files = write_shards(split, tmp_path, 60)
    assert [f.name for f in files] == [f"part-{i:06d}.tar" for i in range(-(-len(split) // 60))]
    source = shards(tmp_path, channels=1)
    assert torch.equal(source.labels, split.labels)
    # Digits have 17 levels of gray: 8 bits round them.
    assert torch.equal(everything(source), (split.batch(torch.arange(len(split))) * 255).round() / 255)
    some = torch.tensor([130, 3, 130, 61])
    assert torch.equal(source.batch(some), everything(source)[some])
    assert write_shards(split, tmp_path / "again", 60)[0].read_bytes() == files[0].read_bytes()


def test_names_of_every_sort_and_what_lies_between(tmp_path: Path) -> None:
    folder = "a folder.v2/" + "x" * 120  # longer than a tar header holds
    members = [
        ("first.PNG", png(0)),
        ("first.cls", b" 4\n"),
        (f"{folder}/ключ ✓.png", png(1)),
        (f"{folder}/ключ ✓.json", b'{"label": 2, "caption": "a cat"}'),
        ("._first.png", b"what a Mac leaves"),
        ("README", b"read me"),
        ("third.txt", b"3"),
        ("third.json", b'{"label": 1}'),  # JSON is asked before text
        ("third.png", png(2)),
        ("third.pyd", pickle.dumps(print)),
        ("fourth.txt", b"0"),
        ("fourth.mask.png", b"of no sample: its ending is mask.png"),
        ("fourth.jpeg", png(3)),
    ]
    archive(tmp_path / "a.tar", members)
    source = shards(tmp_path / "a.tar")
    assert source.labels.tolist() == [4, 2, 1, 0]
    assert torch.equal(everything(source), TRUTH[:4])
    assert shards(tmp_path / "a.tar", labels=False).labels is None
    with tarfile.open(tmp_path / "a.tar", "a") as file:  # links are never followed
        member = tarfile.TarInfo("fifth.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(member)
    assert len(shards(tmp_path / "a.tar")) == 4


def test_one_name_in_two_archives_is_two_samples(tmp_path: Path) -> None:
    for place in range(3):
        archive(tmp_path / f"p-{place:03d}.tar", [("0.png", png(place)), ("0.cls", str(place).encode())])
    source = shards(tmp_path)
    assert source.labels.tolist() == [0, 1, 2]
    assert torch.equal(everything(source), TRUTH[:3])
    some = shards(f"{tmp_path}/p-{{001..002}}.tar")
    assert torch.equal(everything(some), TRUTH[1:3])
    assert describe(source) != describe(some)
    # The same archives elsewhere are the same source, but for the path.
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tmp_path.glob("*.tar"):
        (moved / file.name).write_bytes(file.read_bytes())
    a, b = describe(shards(tmp_path)), describe(shards(moved))
    assert a.pop("path") != b.pop("path")
    assert a == b


def test_ranges(tmp_path: Path) -> None:
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b7.tar"):
        archive(tmp_path / name, [])
    assert [f.name for f in shard_files(tmp_path / "a-{08..10}.tar")] == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert [f.name for f in shard_files(tmp_path / "b{7..7}.tar")] == ["b7.tar"]
    with pytest.raises(InputError, match=r"a-11\.tar' does not exist; name a folder of archives, or a range"):
        shard_files(tmp_path / "a-{08..11}.tar")


def test_a_source_travels_to_other_processes(tmp_path: Path) -> None:
    source = shards(archive(tmp_path / "a.tar", [("0.png", png(0)), ("1.png", png(1))]))
    assert source.labels is None
    source.batch(torch.tensor([0]))  # its file is open now
    there = pickle.loads(pickle.dumps(source))  # noqa: S301  (as a DataLoader's worker gets it)
    assert torch.equal(everything(there), TRUTH[:2])


GOOD = ("0.png", png(0))


@pytest.mark.parametrize(
    ("members", "options", "said"),
    [
        ([GOOD, ("0.cls", b"0"), ("1.png", png(1))], {}, "sample '1' in .* has no class where others have one"),
        ([GOOD, ("1.png", png(1)), ("1.cls", b"0")], {}, "the first one in .* has no class where others have one"),
        ([GOOD], {"labels": True}, "sample '0' in .* has no class"),
        ([GOOD, ("0.cls", b"cat")], {}, "'0.cls' in .* holds 'cat', not a class number"),
        ([GOOD, ("0.cls", b"-1")], {}, "not a class number"),
        ([GOOD, ("0.json", b"[" * 100_000)], {}, "not a class number"),
        ([GOOD, ("0.json", b'{"label": true}')], {}, "holds True, not a class number"),
        ([GOOD, ("0.cls", b"1" * 2_000_000)], {}, "has 2000000 bytes and is to be a class number"),
        ([GOOD, GOOD], {}, "holds '0.png' twice; remove one of them"),
        ([GOOD, ("0.jpg", png(1))], {}, "has several images; choose one by its ending"),
        ([GOOD, ("1.cls", b"0")], {}, "sample '1' in .* has no image"),
        ([("a.txt", b"a caption")], {}, "sample 'a' in .* has no image"),
        ([], {}, "holds no image"),
        ([GOOD], {"channels": 2}, "gray \\(channels=1\\) or color"),
        ([GOOD], {"size": 0}, "size must be a whole number of at least 1"),
    ],
)
def test_archives_that_make_no_samples_are_refused(
    members: list[tuple[str, bytes]], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    archive(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match=said) as caught:
        shards(tmp_path / "a.tar", **options)
    assert len(sentence(caught)) < 400


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    whole = archive(tmp_path / "a.tar", [GOOD, ("1.png", png(1)[:-40]), ("2.png", b"GIF89a?"), ("3.png", b"")])
    source = shards(whole)
    for place in (1, 2, 3):
        with pytest.raises(IntegrityError, match=rf"a\.tar, sample {place} at byte \d+' cannot be read") as caught:
            source.batch(torch.tensor([0, place]))
        sentence(caught)
    small = io.BytesIO()
    Image.fromarray(PIXELS[0][:3, :3]).save(small, "PNG")
    mixed = shards(archive(tmp_path / "b.tar", [GOOD, ("1.png", small.getvalue())]))
    with pytest.raises(InputError, match=r"has 3 × 3 pixels where the first has 6 × 5; pass size="):
        everything(mixed)
    assert everything(shards(tmp_path / "b.tar", size=4)).shape == (2, 3, 4, 4)


def test_archives_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    good = archive(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(4)])
    data = good.read_bytes()
    with tarfile.open(good) as file:
        members = file.getmembers()
    bad = tmp_path / "b.tar"
    middle = members[2].offset
    for damaged in (
        data[: members[3].offset_data + 10],  # within an image
        data[: middle + 100],  # within a header
        data[:middle] + b"\xff" * 512 + data[middle + 512 :],  # which tarfile takes for the end
        data[: middle + 3] + b"~" + data[middle + 4 :],  # the checksum of the header tells
        b"not an archive at all" * 100,
        b"",
    ):
        bad.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="is not a whole tar archive") as caught:
            shards(bad)
        sentence(caught)
    # Without the zeros at the end it is whole all the same.
    bad.write_bytes(data[: members[3].offset_data + (members[3].size + 511) // 512 * 512])
    assert len(shards(bad)) == 4
    bad.write_bytes(b"\x1f\x8b" + data)
    with pytest.raises(InputError, match="is compressed; unpack it first"):
        shards(bad)


# --------------------------------------------------------------------------------- folders and functions


def test_folders_with_and_without_classes(tmp_path: Path) -> None:
    for place, name in enumerate(["b/2.png", "a/1.png", "a/0.png"]):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(png(place))
    source = open_source(tmp_path / "tree")
    assert source.labels.tolist() == [0, 0, 1]
    assert torch.equal(everything(source), TRUTH[[2, 1, 0]])
    flat = open_source(tmp_path / "tree" / "a", channels=1)
    assert flat.labels is None
    gray = np.stack([np.array(Image.fromarray(PIXELS[i]).convert("L")) for i in (2, 1)])
    assert torch.equal(everything(flat), torch.from_numpy(gray)[:, None].float() / 255)
    (tmp_path / "parts" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="has parts; name one of them"):
        open_source(tmp_path / "parts")


def test_what_a_function_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def arrays(n=3): return torch.full((n, 2), .5), list(range(n))\n"
        "def bytes_(): return torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)\n"
        "def items(): return TensorDataset(torch.rand(4, 2), torch.tensor([3, 1, 0, 2]))\n"
        "def nothing(): return 7\n"
        "def failing(): raise ZeroDivisionError('no\\nluck')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = open_source("mine:arrays", n=4)
    assert source.labels.tolist() == [0, 1, 2, 3]
    assert open_source("mine:bytes_").batch(torch.tensor([1])).unique().tolist() == [1.0]
    assert open_source("mine:items").labels.tolist() == [3, 1, 0, 2]
    with pytest.raises(InputError, match="not of int"):
        open_source("mine:nothing")
    with pytest.raises(InputError, match="'mine:failing' failed: ZeroDivisionError: no luck"):
        open_source("mine:failing")
    with pytest.raises(InputError, match="unknown name in module 'mine': 'arays'"):
        open_source("mine:arays")
    with pytest.raises(InputError, match="does not exist; name a folder, archives, hf:FOLDER or module:function"):
        open_source("nowhere")
    with pytest.raises(InputError, match=r"unknown option of images in .*: 'sise'; did you mean 'size'"):
        open_source(tmp_path, sise=3)
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"neither a folder of images nor a \.tar archive"):
        open_source(tmp_path / "a.zip")


def test_sources_of_data_in_memory() -> None:
    split = Split(TRUTH, torch.arange(7), "train")
    assert as_source(split) is split
    assert torch.equal(as_source((TRUTH, range(7))).labels, torch.arange(7))
    for wrong in (TRUTH.long(), TRUTH[:0], TRUTH / 0, "text", (TRUTH, range(6))):
        with pytest.raises(InputError):
            as_source(wrong)
    other = TRUTH.clone()
    other[3, 0, 0, 0] += 0.1
    assert describe(as_source(TRUTH)) != describe(as_source(other))


# -------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["x", "y", "z"]),
            "text": datasets.Value("string"),
        }
    )
    rows = {"image": [Image.fromarray(p) for p in PIXELS], "label": [0, 1, 2, 0, 1, 2, 0], "text": list("abcdefg")}
    data = datasets.Dataset.from_dict(rows, features=features)
    folder = tmp_path_factory.mktemp("hf")
    data.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": data, "test": data.select([3, 1])}).save_to_disk(folder / "parts")
    return folder


def test_a_hugging_face_data_set_is_read(saved: Path) -> None:
    source = open_source(f"hf:{saved / 'one'}")
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(everything(source), TRUTH)
    chosen = open_source(f"hf:{saved / 'parts'}", split="test")
    assert torch.equal(everything(chosen), TRUTH[[3, 1]])
    assert chosen.labels.tolist() == [0, 1]
    there = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert torch.equal(there.batch(torch.tensor([6, 0])), TRUTH[[6, 0]])
    import datasets

    shuffled = datasets.load_from_disk(str(saved / "one")).select([5, 2, 4])
    assert torch.equal(everything(hugging_face(shuffled, label=None)), TRUTH[[5, 2, 4]])
    assert hugging_face(shuffled, label=None).labels is None
    assert hugging_face(shuffled).labels.tolist() == [2, 2, 1]


def test_what_a_hugging_face_data_set_lacks_is_named(saved: Path, tmp_path: Path) -> None:
    for place, options, said in (
        (saved / "parts", {}, "has the parts train, test; choose one: split="),
        (saved / "parts", {"split": "tset"}, "unknown part of .*: 'tset'; did you mean 'test'"),
        (saved / "one", {"image": "imag"}, "unknown column .*'imag'; did you mean 'image'"),
        (saved / "one", {"image": "label"}, "column 'label' of .* has no images"),
        (saved / "one", {"label": "text"}, "column 'text' of .* has no class numbers"),
        (saved / "one", {"label": "class"}, "unknown column of"),
        (tmp_path / "none", {}, "is no folder; fetch the data set yourself"),
        (tmp_path, {}, "holds no data set"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            open_source(f"hf:{place}", **options)
        sentence(caught)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (saved / "one").iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:200] if file.suffix == ".arrow" else file.read_bytes())
    with pytest.raises(IntegrityError, match="cannot be read"):
        open_source(f"hf:{broken}")
    assert json.loads((saved / "one" / "state.json").read_text())  # what was read is as it was
