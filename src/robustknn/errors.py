"""The errors a user can meet: one sentence each, saying what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

_ROOM = 160
"""Characters of a message that a list of names may take."""


class RobustKNNError(Exception):
    """Base of every error raised on purpose. The command line prints it without a traceback."""


class InputError(RobustKNNError, ValueError):
    """Something the caller passed cannot work: shape, dtype, range, name, combination."""


class NotReadyError(RobustKNNError, AttributeError, ValueError):
    """A method was called before `fit` / `calibrate`, or without references."""


class IntegrityError(RobustKNNError):
    """A file or artifact is truncated, altered, of another kind, or made for another model."""


class ResumeError(RobustKNNError):
    """A run directory was made with something other than what it would be continued with."""


class MissingExtraError(RobustKNNError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'robustknn[{extra}]'.")


@contextmanager
def needs(package: str, extra: str) -> Iterator[None]:
    """Around the import of an optional package: MissingExtraError where it is not there.

    A broken installation, or one that does not suit what is beside it, raises anything, and counts as none.
    """
    try:
        yield
    except Exception as error:
        raise MissingExtraError(package, extra) from error


@dataclass(frozen=True)
class Carried:
    """An error of ours that another process met, on its way home as text, where it is raised as what it is."""

    kind: str
    sentence: str

    @classmethod
    def of(cls, error: RobustKNNError, where: str = "") -> Carried:
        """Wrap an error up; `where` is said before its sentence."""
        return cls(type(error).__name__, where + str(error))

    def error(self) -> RobustKNNError:
        """The error itself. Its constructor may want other arguments than a sentence, and is not called."""
        error = RobustKNNError.__new__(_kinds().get(self.kind, RobustKNNError))
        error.args = (self.sentence,)
        return error


def _kinds() -> dict[str, type[RobustKNNError]]:
    """Every kind of our errors, by name."""
    found, new = {RobustKNNError.__name__: RobustKNNError}, [RobustKNNError]
    while new:
        new = [kind for parent in new for kind in parent.__subclasses__()]
        found |= {kind.__name__: kind for kind in new}
    return found


def brief(value: Any, width: int = 80) -> str:
    """What a value prints as, on one line of at most `width` characters; its type when it cannot print itself."""
    try:
        text = repr(value)
    except Exception:  # a number of 5,000 digits, a list of 1,000 levels, anyone's class
        text = f"some {type(value).__name__}"
    return _one_line(text, width)


def reason(error: BaseException, width: int = 120) -> str:
    """What another library's error says, as a piece of one of our sentences: one line, no period at the end."""
    return _one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__, width).rstrip(".")


def _one_line(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name nobody knows: names close matches, or (the first of) all names when nothing is close."""
    known = sorted(set(known))
    close = get_close_matches(str(name), known, n=3, cutoff=0.5)
    if close:
        hint = "did you mean " + " or ".join(brief(c) for c in close) + "?"
    elif known:
        shown = ", ".join(known)
        if len(shown) > _ROOM:
            shown = f"{shown[:_ROOM].rpartition(', ')[0] or shown[:_ROOM]} … ({len(known)} in all)"
        hint = f"known: {shown}."
    else:
        hint = "none is known."
    return InputError(f"unknown {kind} {brief(name)}; {hint}")
