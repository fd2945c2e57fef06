"""The pickles that CIFAR is published in, read without unpickling.

A pickle is a program for a small stack machine, and two of its instructions call any function there is. This
machine knows only the instructions that lists, dictionaries, texts, numbers and arrays of bytes need; it never
looks a name up. The four names that stand for an array of bytes are recognised as words; any other is refused.
Every size is checked against the bytes that are there before anything is made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np

from robustknn.errors import IntegrityError

Array = np.ndarray[Any, np.dtype[np.uint8]]


class _Name(Enum):
    """The global names a CIFAR file refers to."""

    RECONSTRUCT = "the function that makes an empty array"
    ARRAY = "the type of arrays"
    DTYPE = "the type of element types"


_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,  # its home since NumPy 2
    ("numpy", "ndarray"): _Name.ARRAY,
    ("numpy", "dtype"): _Name.DTYPE,
}


class _Bytes(Enum):
    """The one element type allowed."""

    UINT8 = "u1"


class _Pending:
    """An array between the instruction that makes it and the one that fills it."""

    content: Array | None = None


def read_pickle(data: bytes, what: str) -> dict[str, Any]:
    """The dictionary that a CIFAR file holds.

    Args:
        data: the whole file: a pickle of protocol 2, as published, to 4.
        what: the file's name, for messages.

    Returns:
        By key (as text): numbers, bytes (the texts of Python 2), texts, lists, tuples, and uint8 arrays, which
        share the memory of one copy of their bytes.

    Raises:
        IntegrityError: the file is truncated or altered, holds something else than such a dictionary, or names
            anything but a NumPy array of bytes (which unpickling would have run).
    """
    try:
        content = _Machine(data, what).run()
        return {_text(key): _finished(value) for key, value in content.items()}
    except (LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise IntegrityError(
            f"{what!r} is truncated, altered or not a CIFAR file ({type(error).__name__}: {error}); get it again."
        ) from error


class _Machine:
    """The stack, the marks on it and the memo of the pickle machine."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._what, self._at = data, what, 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> dict[Any, Any]:
        while (code := self._take(1)) != b".":
            if code not in _INSTRUCTIONS:
                raise ValueError(f"instruction 0x{code.hex()} at byte {self._at - 1}")
            method, argument = _INSTRUCTIONS[code]
            method(self, argument)
        (result,) = self._stack
        if type(result) is not dict or self._at != len(self._data):
            raise ValueError(f"a {type(result).__name__} and {len(self._data) - self._at} bytes after it")
        return result

    # -------------------------------------------------------------------------------------- reading

    def _take(self, n: int) -> bytes:
        if not 0 <= n <= len(self._data) - self._at:
            raise ValueError(f"{n} bytes announced where {len(self._data) - self._at} are left")
        self._at += n
        return self._data[self._at - n : self._at]

    def _number(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self._take(struct.calcsize(layout)))
        return int(value)

    def _line(self) -> str:
        return self._take(self._data.index(b"\n", self._at) + 1 - self._at)[:-1].decode("ascii")

    def _above_mark(self) -> list[Any]:
        mark = self._marks.pop()
        above = self._stack[mark:]
        del self._stack[mark:]
        return above

    # --------------------------------------------------------------------------------- instructions

    def skip(self, n: int) -> None:
        self._take(n)

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def push_new(self, kind: Callable[[], Any]) -> None:
        self._stack.append(kind())

    def push_number(self, layout: str) -> None:
        self._stack.append(self._number(layout))

    def push_bytes(self, layout: str) -> None:
        self._stack.append(self._take(self._number(layout)))

    def push_text(self, layout: str) -> None:
        self._stack.append(self._take(self._number(layout)).decode("utf-8"))

    def mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def tuple_of(self, n: int) -> None:
        self._marks.append(len(self._stack) - n)
        self.tuple_above(None)

    def tuple_above(self, _: None) -> None:
        self._stack.append(tuple(self._above_mark()))

    def append(self, _: None) -> None:
        value = self._stack.pop()
        self._top(list).append(value)

    def extend(self, _: None) -> None:
        values = self._above_mark()
        self._top(list).extend(values)

    def set_one(self, _: None) -> None:
        self._marks.append(len(self._stack) - 2)
        self.set_many(None)

    def set_many(self, _: None) -> None:
        pairs = self._above_mark()
        target = self._top(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (bytes, str):
                raise TypeError(f"a {type(key).__name__} as a key")
            target[key] = value

    def put(self, layout: str) -> None:
        self._memo[self._number(layout)] = self._stack[-1]

    def memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, layout: str) -> None:
        self._stack.append(self._memo[self._number(layout)])

    def name(self, _: None) -> None:
        self._push_name(self._line(), self._line())

    def name_from_stack(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_name(module, name)

    def _push_name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name that is no text")
        if (module, name) not in _NAMES:
            raise IntegrityError(
                f"{self._what!r} asks for {f'{module}.{name}'[:80]!r}, which no CIFAR file needs and which "
                "unpickling it would have run; nothing was run, get the file from its official source."
            )
        self._stack.append(_NAMES[module, name])

    def call(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if function is _Name.RECONSTRUCT and type(arguments) is tuple and arguments[0] is _Name.ARRAY:
            self._stack.append(_Pending())
        elif function is _Name.DTYPE and type(arguments) is tuple and arguments[0] in (b"u1", "u1"):
            self._stack.append(_Bytes.UINT8)
        else:
            raise TypeError("a call that makes no array of bytes")

    def build(self, _: None) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(state) is not tuple:
            raise TypeError("a state that is no tuple")
        if target is _Bytes.UINT8 and state[1] in (b"|", "|"):
            return
        if type(target) is not _Pending:
            raise TypeError("a state for something that has none")
        _, shape, element, by_columns, content = state
        if element is not _Bytes.UINT8 or by_columns is not False or type(content) is not bytes:
            raise TypeError("an array of something else than bytes by rows")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array of impossible shape")
        target.content = np.frombuffer(content, np.uint8).reshape(shape)

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise TypeError(f"a {type(self._stack[-1]).__name__} used as a {kind.__name__}")
        return self._stack[-1]


# Numbers are little-endian; B, H, i, I are 1, 2 and 4 bytes as in `struct`.
_INSTRUCTIONS: dict[bytes, tuple[Callable[[_Machine, Any], None], Any]] = {
    b"\x80": (_Machine.skip, 1),  # the protocol's number
    b"\x95": (_Machine.skip, 8),  # the length of a frame
    b"N": (_Machine.push, None),
    b"\x88": (_Machine.push, True),
    b"\x89": (_Machine.push, False),
    b"]": (_Machine.push_new, list),
    b"}": (_Machine.push_new, dict),
    b"K": (_Machine.push_number, "<B"),
    b"M": (_Machine.push_number, "<H"),
    b"J": (_Machine.push_number, "<i"),
    b"U": (_Machine.push_bytes, "<B"),
    b"T": (_Machine.push_bytes, "<i"),
    b"C": (_Machine.push_bytes, "<B"),
    b"B": (_Machine.push_bytes, "<I"),
    b"\x8c": (_Machine.push_text, "<B"),
    b"X": (_Machine.push_text, "<I"),
    b"(": (_Machine.mark, None),
    b")": (_Machine.tuple_of, 0),
    b"\x85": (_Machine.tuple_of, 1),
    b"\x86": (_Machine.tuple_of, 2),
    b"\x87": (_Machine.tuple_of, 3),
    b"t": (_Machine.tuple_above, None),
    b"a": (_Machine.append, None),
    b"e": (_Machine.extend, None),
    b"s": (_Machine.set_one, None),
    b"u": (_Machine.set_many, None),
    b"q": (_Machine.put, "<B"),
    b"r": (_Machine.put, "<I"),
    b"\x94": (_Machine.memoize, None),
    b"h": (_Machine.get, "<B"),
    b"j": (_Machine.get, "<I"),
    b"c": (_Machine.name, None),
    b"\x93": (_Machine.name_from_stack, None),
    b"R": (_Machine.call, None),
    b"b": (_Machine.build, None),
}


def _text(key: bytes | str) -> str:
    return key.decode("latin-1") if isinstance(key, bytes) else key


def _finished(value: Any) -> Any:
    if type(value) is not _Pending:
        return value
    if value.content is None:
        raise ValueError("an array without content")
    return value.content
