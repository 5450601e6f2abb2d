"""When a wait is over: a row differs from what the caller has seen, or satisfies a predicate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pgtoolset._native import row_comparator
from pgtoolset.errors import RowDeletedError, RowNotFoundError
from pgtoolset.watch._loading import values_of
from pgtoolset.watch.targets import Target

__all__ = ["Condition", "differs"]


class Condition:
    """What `wait_for_row_change` waits for.

    Args:
        target: the model and its watched columns.
        row: the row in words, for messages.
        until: the caller's predicate; it decides alone.
        baseline: the values that the caller has seen. The first row that is checked adds the
            watched columns that it lacks.
    """

    def __init__(
        self,
        target: Target[Any],
        row: str,
        until: Callable[[Any], object] | None,
        baseline: Mapping[str, Any] | None,
    ) -> None:
        self._target = target
        self._row = row
        self._until = until
        self._has_seen_row = baseline is not None
        self._baseline = dict(baseline or {})

    def is_met(self, row: Any) -> bool:
        """Return whether the wait ends with this row, a detached instance; `None` means no row.

        Raises:
            RowNotFoundError: there is no row.
            RowDeletedError: there is no row any more.
        """
        if row is None:
            if self._has_seen_row:
                raise RowDeletedError(f"{self._row} was deleted while its change was awaited.")
            raise RowNotFoundError(f"{self._row} does not exist.")
        self._has_seen_row = True
        if self._until is not None:
            return bool(self._until(row))
        values = values_of(self._target, row)
        self._baseline = {**values, **self._baseline}
        return differs(self._baseline, values)


def differs(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Return whether a value of `after` is another than that of the same name in `before`."""
    return any(not row_comparator.same_value(before[name], after[name]) for name in after)
