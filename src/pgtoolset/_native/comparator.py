"""Finds what changed between two looks at many rows: all of both looks in, what differs out.

Flat and stateless, so that it profits from being compiled. Most looks are compared as text, all
rows of one in a single value, and no object is made of a row that is as it was. Rows whose text
differs are fetched and compared by their values. Two looks at the same value make two objects, so
equality has to be sane for every type that a codec can produce: NaN is itself, an `__eq__` that
raises or answers with an array decides nothing, and nothing needs to be hashable but the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgtoolset._native import _pure as cython
    from pgtoolset._native._pure import memchr, memcmp
else:
    try:
        import cython
    except ModuleNotFoundError:
        from pgtoolset._native import _pure as cython
    if cython.compiled:
        from cython.cimports.libc.string import memchr, memcmp

__all__ = ["changed_lines", "changed_rows", "same_value"]


def changed_lines(before: bytes, after: bytes) -> tuple[list[bytes], list[bytes]]:
    """The lines of `before` that `after` does not have, and those of `after` that `before` does not
    have.

    Args:
        before: lines, with a newline between each two. None is empty, and none is there twice.
        after: the same; as a rule nearly the same lines, nearly in the same order.
    """
    if type(before) is not bytes or type(after) is not bytes:
        raise TypeError(f"lines are bytes, not {type(before).__name__} and {type(after).__name__}")
    gone: list[bytes] = []
    added: list[bytes] = []
    if before == after:
        return gone, added
    if not cython.compiled or not _walk(before, after, gone, added):
        gone = before.split(b"\n") if before else []
        added = after.split(b"\n") if after else []
    if not gone or not added:
        return gone, added
    # A line that has only moved is in both.
    known, found = set(gone), set(added)
    return [line for line in gone if line not in found], [
        line for line in added if line not in known
    ]


def changed_rows(
    rows: Sequence[Sequence[Any]], known: Mapping[Any, Sequence[Any]], width: int
) -> list[int]:
    """The positions of the rows that differ from what is known under their key, or are not known at
    all.

    Args:
        rows: the rows of a look, each with its key in front and its text at the end. Where texts
            are missing, the values decide.
        known: the row of the last look by its key: the first value, or with a `width` above 1 a
            tuple.
        width: how many values make the key.
    """
    changed: list[int] = []
    position: cython.Py_ssize_t = 0
    is_scalar: cython.bint = width == 1
    for row in rows:
        before = known.get(row[0] if is_scalar else tuple(row[:width]))
        if before is None or not _same_row(before, row):
            changed.append(position)
        position += 1
    return changed


@cython.cfunc
def _same_row(before: Any, row: Any) -> cython.bint:
    text = row[-1]
    if text is not None and before[-1] is not None:
        return bool(text == before[-1])
    try:
        # In C, and true for almost every row of almost every look.
        if before == row:
            return True
    except Exception:
        pass
    return _same_items(before, row)


def same_value(left: Any, right: Any) -> bool:
    """Whether two values are the same for somebody who waits for a change."""
    if left is right:
        return True
    try:
        if left == right:
            return True
    except Exception:
        return _alike(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return _same_items(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            same_value(value, right[key]) for key, value in left.items()
        )
    try:
        return bool(left != left) and bool(right != right)  # NaN
    except Exception:
        return False


@cython.cfunc
def _same_items(left: Any, right: Any) -> cython.bint:
    if len(left) != len(right):
        return False
    for one, other in zip(left, right, strict=True):
        if not same_value(one, other):
            return False
    return True


@cython.cfunc
def _alike(left: Any, right: Any) -> cython.bint:
    """Of values that will not say whether they are equal: whether they look the same, to the last
    byte if they can."""
    if type(left) is not type(right):
        return False
    try:
        if repr(left) != repr(right):
            return False
        if hasattr(left, "tobytes"):  # an array, whose repr leaves out the middle
            return bool(left.tobytes() == right.tobytes())
        return True
    except Exception:
        return False


@cython.cfunc
def _end(
    data: cython.p_const_char, start: cython.Py_ssize_t, size: cython.Py_ssize_t
) -> cython.Py_ssize_t:
    """Where the line ends that begins at `start`."""
    found: cython.p_const_char = cython.cast(
        cython.p_const_char, memchr(data + start, 10, size - start)
    )
    return size if found is cython.NULL else found - data


@cython.cfunc
def _walk(before: bytes, after: bytes, gone: list[bytes], added: list[bytes]) -> cython.bint:
    """Go through both side by side, in C alone; whether that got to the ends, or the order is
    another one altogether.

    Collects what has no partner where it stands. A line that has moved is collected on both sides.
    """
    old: cython.p_const_char = before
    new: cython.p_const_char = after
    old_size: cython.Py_ssize_t = len(before)
    new_size: cython.Py_ssize_t = len(after)
    i: cython.Py_ssize_t = 0
    j: cython.Py_ssize_t = 0
    i_end: cython.Py_ssize_t
    j_end: cython.Py_ssize_t
    end: cython.Py_ssize_t
    patience: cython.Py_ssize_t = 64
    while i < old_size and j < new_size:
        i_end = _end(old, i, old_size)
        j_end = _end(new, j, new_size)
        if i_end - i == j_end - j and memcmp(old + i, new + j, i_end - i) == 0:
            i = i_end + 1
            j = j_end + 1
            patience += 1
            continue
        # What stands there may be the one after next to it: then one line has gone from here, or
        # has come.
        if i_end < old_size:
            end = _end(old, i_end + 1, old_size)
            if end - i_end - 1 == j_end - j and memcmp(old + i_end + 1, new + j, j_end - j) == 0:
                gone.append(before[i:i_end])
                i = i_end + 1
                continue
        if j_end < new_size:
            end = _end(new, j_end + 1, new_size)
            if end - j_end - 1 == i_end - i and memcmp(new + j_end + 1, old + i, i_end - i) == 0:
                added.append(after[j:j_end])
                j = j_end + 1
                continue
        gone.append(before[i:i_end])
        added.append(after[j:j_end])
        i = i_end + 1
        j = j_end + 1
        patience -= 2
        if patience < 0:
            return False
    while i < old_size:
        i_end = _end(old, i, old_size)
        gone.append(before[i:i_end])
        i = i_end + 1
    while j < new_size:
        j_end = _end(new, j, new_size)
        added.append(after[j:j_end])
        j = j_end + 1
    return True
