"""Bad input on the command line: one sentence that says what to do, exit code 2, nothing left behind."""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from command import call, refuse, succeed
from safetensors.torch import save_file

from robustknn import load_model
from robustknn.evaluation.experiment_config import read_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    succeed("train", "--epochs", 1, "--out", folder)
    return folder


def evaluate(checkpoint: Path, out: Path, *more: Any) -> str:
    """The sentence by which an evaluation of this is refused; the folder must not be there then."""
    few = ["--n", 5, "--references-per-class", 5, "--controls", 0]
    sentence = refuse("evaluate", "--checkpoint", checkpoint, *few, "--out", out, *more)
    assert not out.exists()
    return sentence


FLAGS: list[tuple[list[Any], str]] = [
    (["-d", "digit"], "unknown data set 'digit'; did you mean 'digits'?"),
    (["-d", "no/such"], "folder 'no/such' does not exist."),
    (["-d", "math:nothing_like_it"], "unknown name in module 'math': 'nothing_like_it'"),
    (["-d", "no_such_module:f"], "module 'no_such_module' of data set"),
    (["-m", "digits-cn"], "unknown model 'digits-cn'; did you mean 'digits-cnn'"),
    (["-m", "math:pi"], "'math:pi' is a float"),
    (["--model-option", "n_clases=10"], "did you mean 'n_classes'"),
    (["-c", "dkn"], "unknown classifier 'dkn'; did you mean 'dknn'"),
    (["-c", "knn", "-c", "knn"], "two classifiers are named 'knn'"),
    (["-l", "relu9"], "unknown layer 'relu9'; did you mean 'relu3'"),
    (["-c", "dknn", "-l", "relu1", "-l", "rellu2"], "did you mean 'relu2'"),
    (["-l", "relu1", "-l", "relu2"], "votes in one layer, not in 2 (relu1, relu2)"),
    (["-a", "pgdd"], "unknown attack 'pgdd'; did you mean 'pgd' or 'apgd'"),
    (["-a", "ask", "-a", "ask"], "two attacks are named 'ask'"),
    (["-a", "ask", "--attack-option", "stepz=3"], "unknown option of attack 'ask': 'stepz'; did you mean 'step'"),
    (["-a", "ask", "--attack-option", "steps=few"], "steps must be a whole number of at least 1, not 'few'."),
    (["-a", "ask", "--attack-option", "steps"], "option 'steps' is not of the form key=value."),
    (["-a", "pgd", "--attack-option", "objective=asq"], "unknown objective 'asq'; did you mean 'ask'?"),
    (["--attack-option", "steps=3"], "--attack-option needs --attack"),
    (["-k", 51], "n_neighbors = 51 exceeds the 50 references; lower it or add references."),
    (["-k", 0], "n_neighbors must be a whole number of at least 1, not 0."),
    (["-k", -3], "n_neighbors must be a whole number of at least 1, not -3."),
    (["--k", "many"], "Invalid value for '--k' / '-k'"),
    (["--eps=-0.1"], "eps must be finite and at least 0"),
    (["--eps", "nan"], "eps must be finite and at least 0"),
    (["--eps", "inf"], "eps must be finite and at least 0"),
    (["--eps", "8/0"], "Invalid value for '--eps' / '-e': '8/0' is not a number; write 0.03 or 8/255."),
    (["--eps", "8"], "eps 8 exceeds 1, which reaches every input within (0.0, 1.0); inputs and eps have the same unit"),
    (["-e", 0.1, "--eps=-0.2"], "eps must be finite and at least 0"),
    (["-e", 0.1, "-e", "nan"], "eps must be finite and at least 0"),
    (["--norm", "l3"], "threat.norm in flags: input should be 'linf', 'l2' or 'l1', not 'l3'."),
    (["--metric", "cosinus"], "metric must be one of 'l2', 'cosine', 'ip', not 'cosinus'."),
    (["--index", "exac"], "unknown index 'exac'; did you mean 'exact'?"),
    (["--protocol", "publish"], "data.protocol in flags: input should be 'standard' or 'published', not 'publish'."),
    (["--device", "gpu"], "device 'gpu' is not available here; choose cpu, or auto."),
    (["--n", 0], "data.n in flags: input should be greater than or equal to 1, not 0."),
    (["--batch-size", 0], "batch_size in flags"),
    (["--controls", -1], "controls in flags"),
    (["--references-per-class", 0], "references.per_class in flags"),
    (["--threads", 0], "Invalid value for '--threads'"),
    (["--attak", "ask"], "No such option: --attak"),
    (["--classifier-option", "metric=l2"], "--classifier-option needs --classifier; name the classifiers it is for."),
    (["-c", "network", "-k", 5], "network has no neighbors, so -k cannot be of it; leave that out."),
    (["-a", "ask", "--attack-option", "steps=3", "--attack-option", "steps=4"], "option steps is given twice"),
    (["-c", "daeknn", "--hardening", 0.1, "--classifier-option", "hardening=0.2"], "says again what another flag says"),
    (["-c", "knn", "--classifier-option", "metric"], "option 'metric' is not of the form key=value."),
    (["-c", "knn", "--classifier-option", "dknn.metric=l2"], "is of 'dknn', which is not named; name it: -c dknn."),
    (["-c", "knn", "--classifier-option", "my-knn.metric=l2"], "is of 'my-knn', which is not named"),
    (["-c", "knn", "--classifier-option", "weighting=x"], "unknown option of classifier 'knn': 'weighting'"),
    (["surplus"], "unexpected extra argument"),
]


@pytest.mark.parametrize(("arguments", "sentence"), FLAGS, ids=[" ".join(map(str, a)) for a, _ in FLAGS])
def test_bad_flags(checkpoint: Path, tmp_path: Path, arguments: list[Any], sentence: str) -> None:
    assert sentence in evaluate(checkpoint, tmp_path / "r", *arguments)


TOML: list[tuple[str, str]] = [
    ("outt = 1", "unknown setting in {}: 'outt'; did you mean 'out'?"),
    ("[data]\nroots = '.'", "unknown setting in {}: 'data.roots'; did you mean 'root'?"),
    ("[thread]\nnorm = 'l2'", "unknown setting in {}: 'thread'; did you mean 'threat'?"),
    ("data = 3", "data in {}: must be a table ([data]), not 3."),
    ("references = []", "references in {}: must be a table ([references]), not []."),
    ("threat = 'linf'", "threat in {}: must be a table of settings, not 'linf'."),
    ("seed = 'one'", "seed in {}: input should be a valid integer"),
    ("seed = true", "seed in {}: must be a whole number, not True."),
    ("batch_size = true", "batch_size in {}: must be a whole number, not True."),
    ("[model]\nname = 3", "model.name in {}: input should be a valid string, not 3."),
    ("[threat]\neps = 'big'", "threat.eps in {}: 'big' is not a number; write 0.03 or 8/255."),
    ("[threat]\neps = [true]", "threat.eps in {}: a radius is a number or text such as '8/255'"),
    ("threat = 3", "threat in {}: must be a table of settings, not 3."),
    ("[threat]\neps = []", "threat.eps in {}: is empty; name at least one."),
    ("[threat]\neps = [0.1, -1.0]", "eps must be finite and at least 0"),
    ("[threat]\neps = [0.1, nan]", "eps must be finite and at least 0"),
    ("classifiers = []", "classifiers in {}: is empty; name at least one."),
    ("classifiers = 'knn'", "classifiers in {}: input should be a valid list, not 'knn'."),
    ("classifiers = [3]", "classifiers.0 in {}: must be a table of settings, not 3."),
    ("[[classifiers]]\nk = 3", "a classifier needs a name, e.g. name = 'knn'; got {{'k': 3}}."),
    ("[[classifiers]]\nname = 3", "a classifier needs a name"),
    ("[[classifiers]]\nname = 'knn'\nk = 3", "unknown option of classifier 'knn': 'k'"),
    ("[[classifiers]]\nname = 'knn'\nn_neighbors = 'five'", "n_neighbors must be a whole number"),
    ("[[classifiers]]\nname = 'knn'\nmetric = 3", "metric must be one of"),
    ("[[classifiers]]\nname = 'knn'\nindex = 3", "index must be the name of an engine"),
    ("[[classifiers]]\nname = 'knn'\nlayer = 3", "a layer of 'knn' is named by text, not by 3."),
    ("[[classifiers]]\nname = 'a/b'\ntype = 'knn'", "classifier name 'a/b' cannot be used"),
    ("[[attacks]]\nnam = 'ask'", "a part of kind attack needs a name, e.g. name = 'ask'; got {{'nam': 'ask'}}."),
    ("[[attacks]]\nname = 'ask'\nlabel = 'clean'", "no attack may be named 'clean'"),
    ("[[attacks]]\nname = 'ask'\nlabel = '../up'", "attack name '../up' cannot be used"),
    ("[[attacks]]\nname = 'pgd'\nobjective = {{name = 'asc'}}", "unknown objective 'asc'; did you mean 'ask'?"),
    ("[[attacks]]\nname = 'pgd'\nobjective = 3", "objective"),
    ("[data.options]\nsize = 3", "unknown option of data set 'digits': 'size'"),
    ("[references]\npool = 'maxx'", "pool must be one of"),
    ("[references.pool]\nrelu9 = 'max'", "unknown layer in pool: 'relu9'; did you mean 'relu3'?"),
    ("plugins = ['no.py']", "plugin file 'no.py' does not exist"),
    ("plugins = 'no.py'", "plugins in {}: input should be a valid list, not 'no.py'."),
    ("out = ", "configuration file '{}' cannot be read: Invalid value"),
    ("\0", "configuration file '{}' cannot be read"),
]


@pytest.mark.parametrize(("text", "sentence"), TOML, ids=[t.replace("\n", " ").replace("\0", "NUL") for t, _ in TOML])
def test_bad_configuration_files(checkpoint: Path, tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text.replace("{{", "{").replace("}}", "}"))
    assert sentence.format(file) in evaluate(checkpoint, tmp_path / "r", "--config", file)


def test_configuration_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 5000)
    for name in ("none.toml", "b.toml", "deep.toml", "."):
        assert "configuration file" in refuse("evaluate", "--config", tmp_path / name, "--print-config")
    assert refuse("evaluate") == ("name the folder of the run: --out runs/NAME (or out = in the configuration file).")


def test_any_damaged_configuration_file_is_read_or_refused(tmp_path: Path) -> None:
    from mutate import mutations

    from robustknn.errors import InputError

    whole = succeed("evaluate", "-a", "ask", "-c", "dknn", "-k", 5, "--n", 5, "--print-config").encode()
    file, said = tmp_path / "x.toml", []
    for data in mutations(whole, 3000, seed=0, splices=(b"[", b"]", b"{", b"= 1\n", b'"', b"nan", b"[[data]]\n")):
        file.write_bytes(data)
        try:
            read_config(file, {"data.n": 3, "threat.norm": "l2"})
        except InputError as error:
            said.append(str(error))
    assert 0 < len(said) < 3000
    assert not [s for s in said if "\n" in s or not s.endswith((".", "?"))]


# ------------------------------------------------------------------------------- checkpoints, data, folders


def test_bad_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    assert "has no weights yet; name a checkpoint" in refuse("evaluate", "--out", out)
    assert "holds no checkpoint" in evaluate(tmp_path / "none", out)
    assert "does not exist" in evaluate(tmp_path / "none.pt", out)
    assert "holds no checkpoint" in evaluate(tmp_path, out)
    (tmp_path / "notes.txt").write_text("no weights")
    assert "is no weights file" in evaluate(tmp_path / "notes.txt", out)
    assert "is of another architecture than this MnistCNN" in evaluate(checkpoint, out, "-m", "mnist-cnn")
    assert "is of another architecture" in evaluate(checkpoint, out, "--model-option", "n_classes=7")

    cut = tmp_path / "cut"
    shutil.copytree(checkpoint, cut)
    weights = next(cut.rglob("weights.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "truncated or altered" in evaluate(cut, out)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is altered" in evaluate(cut, out)
    weights.unlink()
    assert "is missing" in evaluate(cut, out)

    state = load_model("digits-cnn", checkpoint).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        assert call("evaluate", "--checkpoint", tmp_path / name, "--n", 2, "--references-per-class", 2).code == 2
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        assert name in evaluate(tmp_path / name, out)


def test_missing_data(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBUSTKNN_DATA", raising=False)
    out = tmp_path / "r"
    assert "set the folder that holds the data with ROBUSTKNN_DATA or --data-root" in evaluate(
        checkpoint, out, "-d", "mnist"
    )
    assert "'cifar10'" in evaluate(checkpoint, out, "-d", "cifar10", "--data-root", tmp_path / "none")
    monkeypatch.setenv("ROBUSTKNN_DATA", str(tmp_path))
    for name in ("mnist", "fashion-mnist", "svhn", "cifar100"):
        sentence = refuse("train", "-d", name, "--out", out)
        assert name in sentence
        assert str(tmp_path) in sentence
    assert not out.exists()


@pytest.mark.parametrize("command", ["evaluate", "train", "demo"])
def test_a_folder_with_something_else_is_left_alone(checkpoint: Path, tmp_path: Path, command: str) -> None:
    more: dict[str, list[Any]] = {
        "evaluate": ["--checkpoint", checkpoint, "--n", 2, "--references-per-class", 5],
        "train": ["--epochs", 1],
        "demo": ["--quick"],
    }
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").write_text("precious")
    if command != "train":  # a training run may share its folder
        sentence = refuse(command, *more[command], "--out", tmp_path / "d")
        assert "is not empty and holds no run; choose another folder." in sentence
        assert [p.name for p in (tmp_path / "d").iterdir()] == ["mine.txt"]
    assert "is a file" in refuse(command, *more[command], "--out", tmp_path / "d" / "mine.txt")
    assert (tmp_path / "d" / "mine.txt").read_text() == "precious"


def test_a_run_killed_before_its_header_was_written_starts_again(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".run.json.123.partial").write_text("{")
    few = ["--n", 2, "--references-per-class", 5, "--controls", 0, "-a", "fgsm"]
    succeed("evaluate", "--checkpoint", checkpoint, *few, "--out", tmp_path / "r")
    (tmp_path / "r" / "environment.json").unlink()
    succeed("evaluate", "--checkpoint", checkpoint, *few, "--out", tmp_path / "r")
    assert not list((tmp_path / "r").rglob("*.partial"))


TRAIN: list[tuple[list[Any], str]] = [
    (["--epochs", 0], "epochs must be a whole number of at least 1, not 0."),
    (["--batch-size", 0], "batch_size must be"),
    (["--lr", -1], "lr must be a number above 0"),
    (["--lr", "nan"], "lr must be a number above 0"),
    (["--optimizer", "adm"], "optimizer must be one of 'sgd', 'adam', 'adamw', not 'adm'."),
    (["--schedule", "steps"], "schedule must be one of"),
    (["--select", "first"], "select must be one of"),
    (["--protocol", "publish"], "protocol must be one of"),
    (["--protocol", "published", "--select", "best"], "needs a validation split"),
    (["--model", "digitscnn"], "did you mean 'digits-cnn'"),
    (["--model", "lenet5"], "cannot run on inputs of shape (1, 1, 8, 8)"),
    (["--device", "cuda:99"], "device 'cuda:99' is not available here"),
    (["--model-option", "x"], "not of the form key=value"),
]


@pytest.mark.parametrize(("arguments", "sentence"), TRAIN, ids=[" ".join(map(str, a)) for a, _ in TRAIN])
def test_bad_training_flags(tmp_path: Path, arguments: list[Any], sentence: str) -> None:
    assert sentence in refuse("train", *arguments, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_training_is_not_continued_with_other_settings(checkpoint: Path, tmp_path: Path) -> None:
    assert "was made with another seed: 0, now 4" in refuse("train", "--epochs", 1, "--seed", 4, "--out", checkpoint)
    assert refuse("train") == "Missing option '--out'. (see --help)"


def test_bad_attack_flags(checkpoint: Path, tmp_path: Path) -> None:
    few = ["--checkpoint", checkpoint, "--n", 3, "--references-per-class", 5, "--out", tmp_path / "adv"]
    for arguments, sentence in (
        (["-a", "asq"], "did you mean 'ask'"),
        (["--eps", "nan"], "eps must be finite"),
        (["--eps=-1"], "eps must be finite"),
        (["--norm", "l0"], "threat.norm in flags"),
        (["-k", 0], "n_neighbors must be"),
        (["-c", "knm"], "did you mean 'knn'"),
        (["-l", "relu9"], "did you mean 'relu3'"),
        (["--n", 0], "data.n in flags"),
    ):
        assert sentence in refuse("attack", *few, *arguments)
        assert not (tmp_path / "adv").exists()


# ------------------------------------------------------------------------------------- plugins, extras


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist; give the path of a Python file."),
        ("raise ValueError('two\\nlines')", "failed to import (ValueError: two lines); correct it or its path."),
        ("def f(:", "failed to import (SyntaxError:"),
        ("import no_such_module", "failed to import (ModuleNotFoundError: No module named 'no_such_module')"),
        (
            "from robustknn import registry\n@registry.attacks.register('ask')\nclass Mine: ...",
            "the attack name 'ask' is registered already; choose another name.",
        ),
    ],
    ids=["missing", "raises", "syntax", "import", "taken"],
)
def test_bad_plugins(checkpoint: Path, tmp_path: Path, content: str | None, sentence: str) -> None:
    file = tmp_path / "plugin.py"
    if content is not None:
        file.write_text(content)
    assert sentence in evaluate(checkpoint, tmp_path / "r", "--plugin", file)
    for command in (["list"], ["train", "--out", tmp_path / "m"]):
        assert sentence in refuse(*command, "--plugin", file)
    assert not (tmp_path / "m").exists()


def test_a_missing_extra_is_named(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    sentence = evaluate(checkpoint, tmp_path / "r", "--index", "faiss")
    assert sentence == "faiss-cpu is not installed; install it with: pip install 'robustknn[faiss]'."


def test_numbers_in_options_are_read_as_the_rest_of_the_command_line_reads_them() -> None:
    from robustknn.cli.options import settings

    read = settings(["share=.1", "a=1e-3", "b=true", "c=[1, 2]", "d=1.5.2", "e=inf", "f=-.5"])
    assert read == {"share": 0.1, "a": 0.001, "b": True, "c": [1, 2], "d": "1.5.2", "e": "inf", "f": -0.5}


def test_options_go_to_all_classifiers_or_to_the_one_named(checkpoint: Path) -> None:
    names = ("-c", "knn", "-c", "daeknn", "--hardening", 0.1, "-k", 5)
    given = ("metric=cosine", "daeknn.weighting=released", "knn.n_neighbors=3")
    flags = [word for pair in given for word in ("--classifier-option", pair)]
    said = tomllib.loads(succeed("evaluate", "--checkpoint", checkpoint, *names, *flags, "--print-config"))
    knn, daeknn = said["classifiers"]
    assert knn == {"name": "knn", "n_neighbors": 3, "metric": "cosine"}
    assert daeknn == {
        "name": "daeknn",
        "n_neighbors": 5,
        "metric": "cosine",
        "hardening": [0.1],
        "weighting": "released",
    }


def test_flags_of_classifiers_do_not_silently_replace_those_of_a_file(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[[classifiers]]\nname = 'dknn'\n")
    for flags in (["-k", 3], ["--metric", "l2"], ["-l", "relu1"], ["--index", "exact"], ["--hardening", 0.1]):
        refused = evaluate(checkpoint, tmp_path / "r", "--config", file, *flags)
        assert "is of classifiers that flags name; change the tables of" in refused, flags
    named = ["-c", "knn", "-k", 3, "--print-config"]
    said = tomllib.loads(succeed("evaluate", "--checkpoint", checkpoint, "--config", file, *named))
    assert said["classifiers"] == [{"name": "knn", "n_neighbors": 3}]


def test_odd_keys_and_values_are_printed_as_toml(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[[attacks]]\nname = "pgd"\n"a b" = 3\nlabel = "x\\u007fy"\nwhen = 1979-05-27\n')
    (told,) = tomllib.loads(succeed("evaluate", "--config", file, "--print-config"))["attacks"]
    assert told == tomllib.loads(file.read_text())["attacks"][0]
