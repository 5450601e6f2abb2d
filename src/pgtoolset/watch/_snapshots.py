"""Which rows of a group have changed: the lines of all rows in one value, tick after tick.

A line is the text of one row, and a snapshot the lines of all rows. Two snapshots that follow each
other are compared as text, which costs far less than to fetch the rows, and the rows whose lines
differ are fetched.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from typing import Any

from pgtoolset._native import row_comparator
from pgtoolset._postgres.rows import RowStatements, array_texts, key_arguments

__all__ = ["Fetch", "SnapshotComparison", "Snapshots"]

#: Runs a statement: `await fetch(statement, *arguments)` returns its rows.
Fetch = Callable[..., Awaitable[list[Any]]]

#: Lines up to which each is searched for in a snapshot. For more, the snapshot is split.
SEARCHED_LINES = 30


class Snapshots:
    """Takes snapshots of the rows of a group.

    Attributes:
        is_usable: whether snapshots tell the changes. Where they do not, every row has to be
            fetched at every tick.
    """

    def __init__(self, statements: RowStatements, width: int) -> None:
        self.is_usable = True
        self.comparison = SnapshotComparison()
        self._statements = statements
        self._width = width
        self._types: list[str] | None = None
        self._sql: dict[bool, str] = {}
        self._keys: Sequence[Any] | None = None
        self._statement = ""
        self._arguments: list[Any] = []

    def clear(self) -> None:
        """Forget everything: no row is watched any more."""
        self._keys = None
        self._statement, self._arguments = "", []
        self.comparison = SnapshotComparison()

    def forget_types(self) -> None:
        """Ask for the types of the keys again, and prepare the statement again."""
        self._keys, self._types = None, None
        self._sql = {}

    def note(self, key: Any, before: Sequence[Any] | None, row: Sequence[Any] | None) -> None:
        """Note that the row of `key` was fetched, or is not watched any more.

        Args:
            key: the key.
            before: the row as it was fetched before, with its line at the end.
            row: the row now; `None` where it does not exist, or is not watched any more.
        """
        if self.is_usable:
            self.comparison.note(
                key, None if before is None else before[-1], None if row is None else row[-1]
            )

    async def changed_keys(
        self,
        fetch: Fetch,
        keys: Sequence[Any],
        known: Mapping[Any, Sequence[Any]],
        watched: Container[Any],
    ) -> set[Any] | None:
        """Return the keys whose rows have to be fetched; `None` where lines are not exact.

        Args:
            fetch: runs a statement.
            keys: all keys that are watched; the same object as before where they are the same.
            known: the rows as they were fetched.
            watched: the keys that are watched when the snapshot has arrived.
        """
        if keys is not self._keys:
            await self._prepare(fetch, keys)
        ((snapshot, is_exact),) = await fetch(self._statement, *self._arguments)
        if keys is not self._keys:
            return set()  # cleared in the meantime
        if not is_exact:
            self.is_usable = False
            return None
        return self.comparison.changed_keys(snapshot or b"", keys, known, watched)

    async def _prepare(self, fetch: Fetch, keys: Sequence[Any]) -> None:
        # The driver takes longer to encode an array than to send its text, which PostgreSQL reads
        # as quickly.
        texts = None
        if not self._statements.returns_given_keys:
            texts = array_texts(keys, self._width)
        if texts is not None and self._types is None:
            statement = self._statements.parameter_types()
            ((_, *types),) = await fetch(statement, *key_arguments([], self._width))
            self._types = types
        as_text = texts is not None
        if as_text not in self._sql:
            self._sql[as_text] = self._statements.snapshot(self._types if as_text else None)
        self._statement = self._sql[as_text]
        self._arguments = texts or key_arguments(keys, self._width)
        self._keys = keys


class SnapshotComparison:
    """Compares each snapshot with the one before.

    A row is fetched a moment after the snapshot that showed its change, and may have changed again
    in between. So the line that was fetched and the line in the snapshot may differ:

    - `_keys_by_line` has the lines that were fetched;
    - `_unconfirmed` has the keys whose fetched lines may be missing in the latest snapshot;
    - `_strange` has the lines of the latest snapshot that were not fetched.

    Every other line is in both. It cannot change without a difference between two snapshots.
    """

    def __init__(self) -> None:
        self._latest = b""
        self._added: set[bytes] = set()
        self._keys_by_line: dict[bytes, Any] = {}
        self._unconfirmed: set[Any] = set()
        self._strange: set[bytes] = set()
        self._released: dict[bytes, Any] = {}  # lines that are not of a known row any more

    def note(self, key: Any, before: bytes | None, line: bytes | None) -> None:
        """Note the line of a row that was fetched; see `Snapshots.note`."""
        if before is not None and self._keys_by_line.pop(before, None) is not None:
            self._released[before] = key
        self._unconfirmed.discard(key)
        if line is not None:
            self._keys_by_line[line] = key
            if line not in self._added:
                self._unconfirmed.add(key)

    def changed_keys(
        self,
        snapshot: bytes,
        keys: Sequence[Any],
        known: Mapping[Any, Sequence[Any]],
        watched: Container[Any],
    ) -> set[Any]:
        """Return the keys whose rows have to be fetched; see `Snapshots.changed_keys`."""
        gone, added = row_comparator.changed_lines(self._latest, snapshot)
        self._latest, self._added = snapshot, set(added)
        changed = {self._keys_by_line[line] for line in gone if line in self._keys_by_line}
        strange = self._strange | self._released_lines(watched)
        changed |= self._refuted_keys(known, strange)
        # The rows that are fetched now have to be confirmed by the next snapshot.
        self._unconfirmed = set(changed)
        self._strange = {line for line in strange | self._added if line not in self._keys_by_line}
        if self._strange:
            # Any row that is not known may have appeared.
            changed.update(key for key in keys if key not in known)
        return changed

    def _refuted_keys(self, known: Mapping[Any, Sequence[Any]], strange: set[bytes]) -> set[Any]:
        """Return the unconfirmed keys whose lines the latest snapshot lacks.

        Args:
            known: the rows as they were fetched.
            strange: lines that may be strange; the ones that the snapshot lacks are removed.
        """
        unconfirmed = {key: known[key][-1] for key in self._unconfirmed if key in known}
        if not unconfirmed and not strange:
            return set()
        present = self._present(strange.union(unconfirmed.values()))
        strange &= present
        return {key for key, line in unconfirmed.items() if line not in present}

    def _released_lines(self, watched: Container[Any]) -> set[bytes]:
        """Return the released lines that count, because their keys are watched again."""
        released, self._released = self._released, {}
        return {line for line, key in released.items() if key in watched}

    def _present(self, lines: set[bytes]) -> set[bytes]:
        """Return those of `lines` that the latest snapshot has."""
        if len(lines) > SEARCHED_LINES:
            return lines.intersection(self._latest.split(b"\n"))
        enclosed = b"\n" + self._latest + b"\n"
        return {line for line in lines if b"\n" + line + b"\n" in enclosed}
