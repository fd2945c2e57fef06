"""Bad input: one sentence each, that names what is wrong and says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from robustknn import errors
from robustknn.checks import (
    as_tensor,
    check_choice,
    check_finite,
    check_inputs,
    check_labels,
    check_positions,
    check_positive_int,
    check_whole,
    class_numbers,
)
from robustknn.errors import (
    InputError,
    IntegrityError,
    MissingExtraError,
    NotReadyError,
    ResumeError,
    RobustKNNError,
    brief,
    reason,
    unknown_name,
)


def check_sentence(text: str) -> None:
    """One sentence: a line of moderate length that ends as sentences do and is not followed by another."""
    assert "\n" not in text
    assert len(text) < 300
    assert text.endswith((".", "?"))
    assert ". " not in text.replace("e.g. ", "")


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


NAN_IN_SAMPLE_3 = torch.zeros(5, 2)
NAN_IN_SAMPLE_3[3, 1] = math.nan
MEASURES = torch.zeros(4, 3)

BATCH = "; pass a batch whose first dimension counts the samples, e.g. x[None] for a single one."
FLOAT = "; convert it to floating point first (8-bit images: x.float() / 255)."
RANGE = ", outside the bounds [0, 1]; scale it, or state other bounds (normalisation belongs inside the model)."
FAISS = "faiss is not installed; install it with: pip install 'robustknn[faiss]'."
KNOWN = ", ".join(f"block{i:03d}" for i in range(16))

BAD: list[tuple[Callable[[], Any], str]] = [
    # what is no array of numbers
    *(
        (lambda value=value: as_tensor(value, "x"), f"x must be a tensor or an array of numbers, not {kind}.")
        for value, kind in (
            ("text", "str"),
            (None, "NoneType"),
            ({"a": 1}, "dict"),
            ({1, 2}, "set"),
            ([[1, 2], [3]], "list"),
            (["a"], "list"),
            ([None], "list"),
            (b"bytes", "bytes"),
            (object(), "object"),
            (np.array(["2020-01-01"], dtype="M8[D]"), "ndarray"),
            (np.array([1, 2], dtype=object), "ndarray"),
            (np.zeros(2, dtype=[("a", "f4")]), "ndarray"),
            ([torch.ones(2, requires_grad=True)], "list"),
        )
    ),
    # inputs
    (lambda: check_inputs(torch.zeros(3)), "x has shape (3,)" + BATCH),
    (lambda: check_inputs(torch.tensor(1.0)), "x has shape ()" + BATCH),
    (lambda: check_inputs(np.zeros((2, 3), np.uint8)), "x has dtype uint8" + FLOAT),
    (lambda: check_inputs(torch.zeros(2, 3, dtype=torch.bool)), "x has dtype bool" + FLOAT),
    (lambda: check_inputs(torch.zeros(2, 3, dtype=torch.complex64)), "x has dtype complex64" + FLOAT),
    (lambda: check_inputs(torch.zeros(0, 3)), "x holds no value (shape (0, 3)); pass at least one sample."),
    (lambda: check_inputs(torch.zeros(3, 0), (0.0, 1.0)), "x holds no value (shape (3, 0)); pass at least one sample."),
    (lambda: check_inputs(NAN_IN_SAMPLE_3), "x has NaN or infinite values, first in sample 3; remove or repair it."),
    (
        lambda: check_inputs(torch.full((1, 2), math.inf), what="the data"),
        "the data has NaN or infinite values, first in sample 0; remove or repair it.",
    ),
    (lambda: check_inputs(torch.full((2, 2), 255.0), (0.0, 1.0)), "x ranges over [255, 255]" + RANGE),
    (lambda: check_inputs(torch.full((2, 2), 1.00001), (0.0, 1.0)), "x ranges over [1.00001, 1.00001]" + RANGE),
    (lambda: check_inputs(-MEASURES - 0.5, (0.0, 1.0)), "x ranges over [-0.5, -0.5]" + RANGE),
    (
        lambda: check_finite(torch.tensor([0.0, 0.0, math.nan]), "v"),
        "v has NaN or infinite values, first in sample 2; remove or repair it.",
    ),
    # labels
    (lambda: check_labels([[1], [2]], 2, 3), "y has shape (2, 1); pass one class number a sample, shape (N,)."),
    (lambda: check_labels(3, 1, 4), "y has shape (); pass one class number a sample, shape (N,)."),
    (lambda: check_labels([0.5, 1.0], 2, 3), "y has dtype float64; class labels are integers 0..C-1."),
    (lambda: check_labels([math.nan], 1, 3), "y has dtype float64; class labels are integers 0..C-1."),
    (lambda: check_labels([math.inf], 1, 3), "y has dtype float64; class labels are integers 0..C-1."),
    (lambda: check_labels([1e30], 1, None), "y has dtype float64; class labels are integers 0..C-1."),
    (lambda: check_labels([True, False], 2, 3), "y has dtype bool; class labels are integers 0..C-1."),
    (lambda: check_labels([1j], 1, 3), "y has dtype complex128; class labels are integers 0..C-1."),
    (lambda: check_labels([0, 1], 3, 3), "y has 2 labels for 3 samples; pass one label a sample."),
    (lambda: check_labels([0, 3], 2, 3), "y holds the label 3, outside 0..2; map labels to 0..C-1 first."),
    (lambda: check_labels([0, -1], 2, 3), "y holds the label -1, outside 0..2; map labels to 0..C-1 first."),
    (
        lambda: check_labels([-7, 9], 2, None, "targets"),
        "targets holds the label -7, outside 0..; map labels to 0..C-1 first.",
    ),
    (lambda: check_labels(["cat"], 1, 3), "y must be a tensor or an array of numbers, not list."),
    (
        lambda: class_numbers(["cat", "elk"], np.array(["ant", "cat"])),
        "y holds the label 'elk', a class that the references lack; leave it out (classes: ['ant', 'cat']).",
    ),
    (
        lambda: class_numbers(torch.tensor([1, 0]), np.array([1, 2, 3]), "targets"),
        "targets holds the label 0, a class that the references lack; leave it out (classes: [1, 2, 3]).",
    ),
    (lambda: class_numbers("cat", np.array(["cat"])), "y has shape (); pass one label a sample, shape (N,)."),
    (lambda: check_positions([0, 5], 5), "position 5 is outside 0..4 of a split of 5."),
    (lambda: check_positions([-1], 5, " in a"), "position -1 in a is outside 0..4 of a split of 5."),
    (lambda: check_positions("a", 5, " in a"), "positions in a must be a tensor or an array of numbers, not str."),
    (
        lambda: check_positions([0.5], 5),
        "positions have shape (1,) and dtype torch.float64; pass whole numbers (B,) or a mask of 5 booleans.",
    ),
    # whole numbers, choices
    (lambda: check_whole(-1, "n", 0), "n must be a whole number of at least 0, not -1."),
    (lambda: check_whole("1", "seed"), "seed must be a whole number, not '1'."),
    (lambda: check_whole(True, "seed"), "seed must be a whole number, not True."),
    *(
        (lambda value=value: check_positive_int(value, "k"), f"k must be a whole number of at least 1, not {shown}.")
        for value, shown in (
            (0, "0"),
            (-3, "-3"),
            (1.0, "1.0"),
            (True, "True"),
            ("5", "'5'"),
            (None, "None"),
            (math.nan, "nan"),
            (torch.tensor(3), "tensor(3)"),
            (np.float64(2), "np.float64(2.0)"),
            (np.zeros((2, 2)), "array([[0., 0.], [0., 0.]])"),
            (-(10**5000), "some int"),
            (nested(100_000), "some list"),
        )
    ),
    *(
        (lambda value=value: check_choice(value, ("a", "b"), "mode"), f"mode must be one of 'a', 'b', not {shown}.")
        for value, shown in (
            ("c", "'c'"),
            ("", "''"),
            (None, "None"),
            (["a"], "['a']"),
            (np.array(["a", "b"]), "array(['a', 'b'], dtype='<U1')"),
            ("x" * 500, "'" + "x" * 78 + "…"),
            ("two\nlines", r"'two\nlines'"),
        )
    ),
    # names
    *(
        (lambda kind=kind, name=name, known=known: _raise(unknown_name(kind, name, known)), said)
        for kind, name, known, said in (
            ("norm", "l3", ["l1", "l2", "linf"], "unknown norm 'l3'; did you mean 'l2' or 'l1'?"),
            ("attack", "pdg", ["pgd", "fgsm", "square"], "unknown attack 'pdg'; did you mean 'pgd'?"),
            ("attack", "zzz", ["pgd", "fgsm"], "unknown attack 'zzz'; known: fgsm, pgd."),
            ("attack", "zzz", [], "unknown attack 'zzz'; none is known."),
            ("attack", 5, ["pgd"], "unknown attack 5; known: pgd."),
            ("attack", "x" * 1000, ["pgd"], "unknown attack '" + "x" * 78 + "…; known: pgd."),
            ("layer", "q", [f"block{i:03d}" for i in range(500)], f"unknown layer 'q'; known: {KNOWN} … (500 in all)."),
            ("layer", "q", ["w" * 900], "unknown layer 'q'; known: " + "w" * 160 + " … (1 in all)."),
        )
    ),
    (lambda: _raise(MissingExtraError("faiss", "faiss")), FAISS),
]


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(("work", "said"), BAD, ids=[f"{i}: {said[:50]}" for i, (_, said) in enumerate(BAD)])
def test_bad_input_is_one_sentence(work: Callable[[], Any], said: str) -> None:
    with pytest.raises(RobustKNNError) as caught:
        work()
    assert str(caught.value) == said
    check_sentence(said)


# ----------------------------------------------------------------------------------- what is accepted


def test_labels_of_any_kind_become_their_places() -> None:
    for classes, labels in (
        (np.array([1, 2, 3]), [3, 1, 3]),
        (np.array(["a", "b", "c"]), ["c", "a", "c"]),
        (np.array(["a", "b", "c"], dtype=object), np.array(["c", "a", "c"])),
        (np.array([0.5, 2.0, 7.0]), torch.tensor([7, 0.5, 7])),
    ):
        assert class_numbers(labels, classes).tolist() == [2, 0, 2]
    assert class_numbers([], np.array(["a"])).tolist() == []
    assert check_positions([True, False, True], 3).tolist() == [0, 2]
    assert check_positions([], 3).tolist() == []
    assert check_whole(-(2**70), "seed") == -(2**70)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([[1.0, 2.0]], torch.float64),
        (np.ones((2, 2), np.float32), torch.float32),
        (np.ones((2, 2), np.float32)[::-1, ::-1], torch.float32),
        (np.ones((2, 3), np.float32).T, torch.float32),
        (np.ones((2, 2), ">f4"), torch.float32),
        (np.ones((2, 2), ">i8"), torch.int64),
        (np.ones((2, 2), np.float16), torch.float16),
        (np.float64(3), torch.float64),
        ([torch.ones(2), torch.ones(2)], torch.float32),
        (range(3), torch.int64),
        ([], torch.float64),
    ],
)
def test_numbers_of_any_make_become_a_tensor(value: Any, dtype: torch.dtype) -> None:
    made = as_tensor(value, "x")
    assert made.dtype == dtype
    assert np.array_equal(made.numpy(), np.asarray(value))


def test_read_only_arrays_are_copied_and_tensors_passed_through() -> None:
    array = np.zeros(3)
    array.flags.writeable = False
    as_tensor(array, "x").fill_(1)
    assert array.sum() == 0
    tensor = torch.zeros(3)
    assert as_tensor(tensor, "x") is tensor


def test_good_inputs_are_returned_as_they_are() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.rand(3, 2, 2).to(dtype)
        assert check_inputs(x, (0.0, 1.0)) is x
    big = torch.full((4, 40000), 60000.0, dtype=torch.float16)  # its sum overflows, its values do not
    assert check_inputs(big) is big
    assert check_inputs(torch.tensor([[-5.0, 1e30]])).shape == (1, 2)


def test_one_rounding_step_beyond_the_bounds_is_forgiven_and_undone() -> None:
    x = torch.tensor([[0.5, 1.0000001, -1e-7]])
    assert check_inputs(x, (0.0, 1.0)).tolist() == [[0.5, 1.0, 0.0]]
    assert x[0, 1] > 1  # the caller's tensor is not touched
    assert check_inputs(torch.tensor([[255.0001]]), (0.0, 255.0)).item() == 255.0


@pytest.mark.parametrize(
    "value", [[0, 1, 2], [0.0, 1.0, 2.0], np.array([0, 1, 2], np.uint8), torch.tensor([0, 1, 2], dtype=torch.int16)]
)
def test_labels_of_any_make_become_int64(value: Any) -> None:
    made = check_labels(value, 3, 3)
    assert made.dtype == torch.int64
    assert made.tolist() == [0, 1, 2]


def test_labels_may_be_none_at_all() -> None:
    assert check_labels([], 0, 3).shape == (0,)
    assert check_labels([5], None, None).tolist() == [5]


def test_whole_numbers_and_choices_come_back() -> None:
    for value in (1, 7, np.int64(7), np.uint8(7)):
        found = check_positive_int(value, "k")
        assert found == value
        assert type(found) is int
    assert check_choice("a", ("a", "b"), "mode") == "a"


# ---------------------------------------------------------------------------------------------- errors


def test_every_error_is_ours_and_what_python_expects() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(NotReadyError, AttributeError)  # hasattr() of a scikit-learn face
    assert issubclass(NotReadyError, ValueError)
    assert issubclass(MissingExtraError, ImportError)
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {InputError, IntegrityError, ResumeError, NotReadyError, MissingExtraError} <= kinds
    for kind in kinds:
        assert issubclass(kind, RobustKNNError)
        assert kind.__doc__


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.5, "1.5"),
        ("a\nb", r"'a\nb'"),
        (np.zeros((2, 2)), "array([[0., 0.], [0., 0.]])"),
        (list(range(100)), repr(list(range(100)))[:79] + "…"),
        (10**5000, "some int"),
        (Silent(), "some Silent"),
    ],
    ids=range(6),
)
def test_brief_fits_a_sentence(value: Any, shown: str) -> None:
    assert brief(value) == shown


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("too bad."), "too bad"),
        (ValueError("first line\n  second\tline.\n"), "first line second line"),
        (KeyError(), "KeyError"),
        (OSError(28, "No space left on device", "file"), "No space left on device"),
        (OSError("told in words"), "told in words"),
        (ValueError("y" * 1000), "y" * 119 + "…"),
    ],
)
def test_reason_fits_a_sentence(error: Exception, said: str) -> None:
    assert reason(error) == said
