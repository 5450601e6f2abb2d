"""The row comparator: what counts as a change."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgtoolset.protocols import RowComparator


class Array:
    """Answers a comparison with another array, as numpy does."""

    def __init__(self, *items: float) -> None:
        self.items = items

    def __eq__(self, other: object) -> Any:
        assert isinstance(other, Array)
        return Array(*(one == another for one, another in zip(self.items, other.items, strict=True)))

    def __bool__(self) -> bool:
        raise ValueError("the truth value of an array is ambiguous")

    def __repr__(self) -> str:
        return "Array(...)"  # leaves out the middle

    def tobytes(self) -> bytes:
        return repr(self.items).encode()

    __hash__ = None  # type: ignore[assignment]


class Raises:
    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compare me not")

    def __repr__(self) -> str:
        return f"Raises({self.value})"

    __hash__ = None  # type: ignore[assignment]


nan = float("nan")


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (None, None),
        (nan, float("nan")),
        (Decimal("NaN"), Decimal("NaN")),
        (Decimal("sNaN"), Decimal("sNaN")),
        ([1.0, nan], [1.0, float("nan")]),
        ({"a": [nan]}, {"a": [float("nan")]}),
        ((1, (nan,)), (1, (float("nan"),))),
        (Array(1, nan, 3), Array(1, nan, 3)),
        (Raises(1), Raises(1)),
        (datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)),
        (Decimal("1.0"), Decimal("1.00")),
    ],
)
def test_same(comparator: RowComparator, left: Any, right: Any) -> None:
    """Equal values are the same, and so are those that no `==` calls equal although nothing has changed."""
    assert comparator.same_value(left, right)
    assert comparator.same_value(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (None, 0),
        (nan, 1.0),
        (nan, None),
        ("", None),
        ([1.0, nan], [nan, 1.0]),
        ([1], [1, 2]),
        ({"a": nan}, {"b": nan}),
        ({"a": 1}, {"a": nan}),
        (Array(1, 2, 3), Array(1, 5, 3)),
        (Raises(1), Raises(2)),
        (Raises(1), None),
        (b"a", memoryview(b"b")),
    ],
)
def test_different(comparator: RowComparator, left: Any, right: Any) -> None:
    """A change is a change, whatever the values think of being compared."""
    assert not comparator.same_value(left, right)
    assert not comparator.same_value(right, left)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.decimals(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@given(values)
def test_a_copy_is_the_same(comparator: RowComparator, value: Any) -> None:
    """A value that was sent twice is no change."""

    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(each) for each in value]
        if isinstance(value, dict):
            return {key: copy(each) for key, each in value.items()}
        if isinstance(value, float):
            return math.ldexp(*math.frexp(value)) if math.isfinite(value) else float(str(value))
        return Decimal(str(value)) if isinstance(value, Decimal) else value

    assert comparator.same_value(value, copy(value))


@given(st.lists(values, min_size=1, max_size=4), st.lists(values, min_size=1, max_size=4), st.integers(1, 2))
def test_changed_rows(comparator: RowComparator, one: list[Any], other: list[Any], width: int) -> None:
    """Rows are told apart by their keys, and by nothing but their values."""
    keys: list[tuple[int, ...]] = [(number,) * width for number in range(4)]
    before = [(*key, *one) for key in keys]
    known = {key if width == 2 else key[0]: row for key, row in zip(keys, before, strict=True)}
    after = [(*keys[0], *one), (*keys[1], *other), (*keys[3], *one), (*(9,) * width, *one)]
    same = len(one) == len(other) and all(comparator.same_value(*pair) for pair in zip(one, other, strict=True))
    assert comparator.changed_rows(after, known, width) == ([3] if same else [1, 3])
    assert comparator.changed_rows(before, {}, width) == [0, 1, 2, 3]
    assert comparator.changed_rows([], known, width) == []
