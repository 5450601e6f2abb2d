"""The node of a cluster that a connection reaches: its cluster, its timeline, primary or standby.

See https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-CONTROLDATA and
https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-BACKUP
"""

from __future__ import annotations

#: SQL: the number that `initdb` gives to a cluster, and that all its standbys have.
SYSTEM_IDENTIFIER = "(SELECT c.system_identifier FROM pg_catalog.pg_control_system() AS c)"

#: SQL: whether the node is a standby.
IS_STANDBY = "pg_catalog.pg_is_in_recovery()"

#: SQL, on a primary only: the name of the WAL file that is written, which begins with the timeline.
#: `pg_control_checkpoint()` would have the timeline of the last checkpoint.
WAL_FILE = "pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn())"


def timeline_of(wal_file: str) -> int:
    """Return the timeline that the name of a WAL file begins with."""
    return int(wal_file[:8], 16)
