"""Finds the rows that changed between two looks: all rows of a slice in, the positions of those that changed out.

Flat and stateless, so that it profits from being compiled. What is compared are the driver's values. Two looks at the
same value make two objects, so equality has to be sane for every type that a codec can produce: NaN is itself, an
`__eq__` that raises or answers with an array decides nothing, and nothing needs to be hashable but the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgtoolset._native import _pure as cython
else:
    try:
        import cython
    except ModuleNotFoundError:
        from pgtoolset._native import _pure as cython

__all__ = ["changed_rows", "same_value"]


def changed_rows(rows: Sequence[Sequence[Any]], known: Mapping[Any, Sequence[Any]], width: int) -> list[int]:
    """The positions of the rows that differ from what is known under their key, or are not known at all.

    Args:
        rows: the rows of a look, each with its key in front.
        known: the row of the last look by its key: the first value, or with a `width` above 1 a tuple.
        width: how many values make the key.
    """
    changed: list[int] = []
    for position, row in enumerate(rows):
        before = known.get(row[0] if width == 1 else tuple(row[:width]))
        if before is not None:
            try:
                # In C, and true for almost every row of almost every look.
                if before == row:
                    continue
            except Exception:
                pass
            if _same_items(before, row):
                continue
        changed.append(position)
    return changed


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
        return left.keys() == right.keys() and all(same_value(value, right[key]) for key, value in left.items())
    try:
        return bool(left != left) and bool(right != right)  # NaN
    except Exception:
        return False


@cython.cfunc
def _same_items(left: Sequence[Any], right: Sequence[Any]) -> bool:
    if len(left) != len(right):
        return False
    for one, other in zip(left, right, strict=True):
        if not same_value(one, other):
            return False
    return True


@cython.cfunc
def _alike(left: Any, right: Any) -> bool:
    """Of values that will not say whether they are equal: whether they look the same, to the last byte if they can."""
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
