"""Finds the changes between two polls of many rows: both results in, the differences out.

The functions are flat and stateless, so that they gain from being compiled. Most results are
compared as text, all rows of a poll in one value, and no object is made for a row that has not
changed. Rows whose text differs are fetched and compared by their values. Two polls make two
objects of one value, so equality has to work for every type that a codec can produce: NaN equals
itself, an `__eq__` that raises or returns an array decides nothing, and only keys need to be
hashable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from pgtoolset._native import _pure as cython

if TYPE_CHECKING:
    from pgtoolset._native._pure import memchr, memcmp
elif cython.compiled:  # never in Python; Cython reads it when it compiles, and then knows the name
    import cython
    from cython.cimports.libc.string import memchr, memcmp

#: Types that Python has equal to booleans: `1 == True`.
_NUMBERS = (int, float, Decimal)

__all__ = ["changed_lines", "changed_rows", "same_value"]


def changed_lines(before: bytes, after: bytes) -> tuple[list[bytes], list[bytes]]:
    """Return the lines of `before` that are not in `after`, and those of `after` not in `before`.

    Args:
        before: lines, separated by newlines; no line is empty or occurs twice.
        after: the same; as a rule nearly the same lines, nearly in the same order.
    """
    if type(before) is not bytes or type(after) is not bytes:
        raise TypeError(
            f"lines must be bytes, not {type(before).__name__} and {type(after).__name__}"
        )
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
    """Return the positions of the rows that are new or differ from the known row with their key.

    Args:
        rows: the rows of a poll, each with its key in front and its text at the end. Without a
            text, the values are compared.
        known: the rows of the last poll by their keys: the first value, or a tuple where `width` is
            above 1.
        width: the number of values of a key.
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
    return _same_items(before, row)


def same_value(left: Any, right: Any) -> bool:
    """Whether two values are the same to a waiter for changes.

    `True` is not the number 1, as in PostgreSQL's jsonb; the numbers 1 and 1.0 are the same.
    """
    if left is right:
        return True
    try:
        if left == right:
            return _same_kind(left, right)
    except Exception:
        return _alike(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return _same_items(left, right)
    if isinstance(left, dict):
        return _same_mappings(left, right)
    try:
        return bool(left != left) and bool(right != right)  # NaN
    except Exception:
        return False


@cython.cfunc
def _same_kind(left: Any, right: Any) -> cython.bint:
    """Whether two values that are equal in Python have their booleans in the same places."""
    if isinstance(left, dict) and isinstance(right, dict):
        return _same_mappings(left, right)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return _same_items(left, right)
    if isinstance(left, bool):
        return isinstance(right, bool) or not isinstance(right, _NUMBERS)
    return not (isinstance(right, bool) and isinstance(left, _NUMBERS))


@cython.cfunc
def _same_mappings(left: Any, right: Any) -> cython.bint:
    if left.keys() != right.keys():
        return False
    for key, value in left.items():
        if not same_value(value, right[key]):
            return False
    return True


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
    """Compare two values without `==`: by their `repr`, and by their bytes where they have them."""
    if type(left) is not type(right):
        return False
    try:
        if repr(left) != repr(right):
            return False
        if hasattr(left, "tobytes"):  # an array; its repr leaves out the middle
            return bool(left.tobytes() == right.tobytes())
        return True
    except Exception:
        return False


@cython.cfunc
def _end(
    data: cython.p_const_char, start: cython.Py_ssize_t, size: cython.Py_ssize_t
) -> cython.Py_ssize_t:
    """Return the end of the line that begins at `start`."""
    found: cython.p_const_char = cython.cast(
        cython.p_const_char, memchr(data + start, 10, size - start)
    )
    return size if found is cython.NULL else found - data


@cython.cfunc
def _walk(before: bytes, after: bytes, gone: list[bytes], added: list[bytes]) -> cython.bint:
    """Go through both side by side in C; `False` where their orders are too different for that.

    A line without a partner at its place is collected. One that has moved is collected on both
    sides.
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
    credit: cython.Py_ssize_t = 64
    while i < old_size and j < new_size:
        i_end = _end(old, i, old_size)
        j_end = _end(new, j, new_size)
        if i_end - i == j_end - j and memcmp(old + i, new + j, i_end - i) == 0:
            i = i_end + 1
            j = j_end + 1
            credit += 1
            continue
        # The line may equal the next one on the other side: then one line was removed or added.
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
        credit -= 2
        if credit < 0:
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
