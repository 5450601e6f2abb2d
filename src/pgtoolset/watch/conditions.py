"""When a wait is over: a row differs from what the caller has seen, or satisfies a predicate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pgtoolset._arguments import check_not_awaitable
from pgtoolset._native import row_comparator
from pgtoolset.errors import RowDeletedError, RowNotFoundError
from pgtoolset.watch._loading import values_of
from pgtoolset.watch.targets import Target

__all__ = ["SAME", "Condition", "differs", "holds"]

#: Stands for a row whose watched values are the ones that the caller has seen.
SAME: Any = object()


class Condition:
    """What `wait_for_row_change` waits for.

    Args:
        target: the model and its watched columns.
        row: the row in words, for messages.
        until: the caller's predicate; it decides alone.
        baseline: the values that the caller has seen. The first row that is checked adds the
            watched columns that it lacks.

    Attributes:
        hidden_by: the tables whose row-level security may hide the row from the last poll, and from
            which role, in words; empty where none is active.
    """

    def __init__(
        self,
        target: Target[Any],
        row: str,
        until: Callable[[Any], object] | None,
        baseline: Mapping[str, Any] | None,
    ) -> None:
        self.hidden_by = ""
        self._target = target
        self._row = row
        self._until = until
        self._has_seen_row = baseline is not None
        self._baseline = dict(baseline or {})
        self._same: tuple[Any, ...] | None = None

    @property
    def needs_row(self) -> bool:
        """Whether only the whole row can tell, because the caller's own function receives it."""
        return self._until is not None

    def is_same(self, values: Sequence[Any]) -> bool:
        """Return whether these values of the watched columns are the ones that were seen."""
        found = tuple(values)
        if self._same is not None and row_comparator.same_value(self._same, found):
            return True
        if self._is_change(dict(zip(self._target.columns, found, strict=True))):
            return False
        self._same = found
        return True

    def is_met(self, row: Any) -> bool:
        """Return whether the wait ends with this row, a detached instance; `None` means no row.

        Raises:
            RowNotFoundError: there is no row, or it is hidden.
            RowDeletedError: there is no row any more.
        """
        if row is SAME:
            return False
        if row is None:
            raise self.missing()
        if self._until is not None:
            self._has_seen_row = True
            return holds(self._until, row)
        return self._is_change(values_of(self._target, row))

    def missing(self) -> RowNotFoundError:
        """Return the error for a row that was not found."""
        if self.hidden_by:
            return RowNotFoundError(
                f"{self._row} is not visible: it does not exist, or row-level security hides it "
                f"({self.hidden_by}). Wait with an engine whose role may see the row."
            )
        if self._has_seen_row:
            return RowDeletedError(f"{self._row} was deleted while its change was awaited.")
        return RowNotFoundError(f"{self._row} does not exist.")

    def _is_change(self, values: Mapping[str, Any]) -> bool:
        self._has_seen_row = True
        self._baseline = {**values, **self._baseline}
        return differs(self._baseline, values)


def differs(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Return whether a value of `after` is another than that of the same name in `before`."""
    return any(not row_comparator.same_value(before[name], after[name]) for name in after)


def holds(until: Callable[[Any], object], row: Any) -> bool:
    """Return whether the caller's predicate holds for a row.

    Raises:
        TypeError: it returned an awaitable, which would always count as true.
    """
    result = until(row)
    check_not_awaitable("until", "a plain function of the row", result)
    return bool(result)
