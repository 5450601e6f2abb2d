"""The rows of a group as text: all of them in one value, compared with the one before, tell which
are to be fetched."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from typing import Any

from pgtoolset._native import row_comparator
from pgtoolset._postgres.rows import Statements, array_texts, key_arguments

__all__ = ["Fetch", "Texts"]

Fetch = Callable[..., Awaitable[list[Any]]]

#: Lines up to which each is searched for in a value; with more, the value is taken apart.
FEW_LINES = 30


class Texts:
    """Which rows are not as they were when they were fetched.

    What a row was then is not quite what the latest value shows: it is fetched a moment later. So
    `_owners` has the texts as they were fetched, by which a line is told to be nobody's;
    `_unverified` the keys of which the text as fetched may not be in `_latest`, and `_unowned`
    lines of it that no row as fetched has. What is in neither is in both alike, and cannot change
    without being seen in the difference of two values.
    """

    def __init__(self, statements: Statements, width: int) -> None:
        self.is_usable = True
        self._statements = statements
        self._width = width
        self._types: list[str] | None = None
        self._sql: dict[bool, str] = {}
        self.clear()

    def clear(self) -> None:
        """Nothing is watched any more."""
        self._keys: Sequence[Any] | None = None
        self._statement = ""
        self._arguments: list[Any] = []
        self._latest = b""
        self._added: set[bytes] = set()
        self._owners: dict[bytes, Any] = {}
        self._unverified: set[Any] = set()
        self._unowned: set[bytes] = set()
        self._released: dict[bytes, Any] = {}

    def note(self, key: Any, before: Sequence[Any] | None, row: Sequence[Any] | None) -> None:
        """The row of `key` was fetched, and is this now; `None`: there is none, or nobody asks any
        more."""
        if not self.is_usable:
            return
        if before is not None and self._owners.pop(before[-1], None) is not None:
            self._released[before[-1]] = key
        self._unverified.discard(key)
        if row is not None:
            self._owners[row[-1]] = key
            if row[-1] not in self._added:
                self._unverified.add(key)

    async def changed(
        self,
        fetch: Fetch,
        keys: Sequence[Any],
        known: Mapping[Any, Sequence[Any]],
        watched: Container[Any],
    ) -> set[Any] | None:
        """The keys, of all these, whose rows are to be fetched; `None` where the texts of this
        database do not tell.

        Args:
            fetch: runs a statement.
            keys: all that are watched; the same object, while they are the same.
            known: the rows as they were fetched.
            watched: the keys that are watched when the answer is there.
        """
        if keys is not self._keys:
            await self._prepare(fetch, keys)
        ((latest, is_exact),) = await fetch(self._statement, *self._arguments)
        if keys is not self._keys:
            return set()  # cleared in the meantime
        if not is_exact:
            self.is_usable = False
            return None
        return self._compare(latest or b"", keys, known, watched)

    def _compare(
        self,
        latest: bytes,
        keys: Sequence[Any],
        known: Mapping[Any, Sequence[Any]],
        watched: Container[Any],
    ) -> set[Any]:
        gone, added = row_comparator.changed_lines(self._latest, latest)
        self._latest, self._added = latest, set(added)
        changed = {self._owners[line] for line in gone if line in self._owners}
        unverified = {key for key in self._unverified if key in known}
        # The lines of rows that are not known any more are of interest only where somebody asks for
        # them again.
        unowned = self._unowned | {line for line, key in self._released.items() if key in watched}
        self._released = {}
        if unverified or unowned:
            present = self._present({known[key][-1] for key in unverified} | unowned)
            changed.update(key for key in unverified if known[key][-1] not in present)
            unowned &= present
        self._unverified = set(
            changed
        )  # until they are fetched, and then the latest value has what was fetched
        self._unowned = {line for line in unowned | self._added if line not in self._owners}
        if self._unowned:
            changed.update(key for key in keys if key not in known)
        return changed

    def _present(self, lines: set[bytes]) -> set[bytes]:
        """Those of `lines` that the latest value has."""
        if len(lines) > FEW_LINES:
            return lines.intersection(self._latest.split(b"\n"))
        enclosed = b"\n" + self._latest + b"\n"
        return {line for line in lines if b"\n" + line + b"\n" in enclosed}

    async def _prepare(self, fetch: Fetch, keys: Sequence[Any]) -> None:
        # The driver takes longer to encode an array than to send its text, which PostgreSQL reads
        # as quickly.
        texts = array_texts(keys, self._width)
        if texts is not None and self._types is None:
            ((_, *types),) = await fetch(self._statements.types(), *key_arguments([], self._width))
            self._types = types
        if (texts is not None) not in self._sql:
            self._sql[texts is not None] = self._statements.texts(
                None if texts is None else self._types
            )
        self._statement = self._sql[texts is not None]
        self._arguments = texts or key_arguments(keys, self._width)
        self._keys = keys
