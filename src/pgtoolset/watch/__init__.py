"""Wait for rows to change."""

from pgtoolset.watch.streams import RowChanges
from pgtoolset.watch.triggers import row_change_trigger
from pgtoolset.watch.waiting import wait_for_row_change
from pgtoolset.watch.watcher import RowWatcher

__all__ = ["RowChanges", "RowWatcher", "row_change_trigger", "wait_for_row_change"]
