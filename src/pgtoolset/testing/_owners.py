"""The owner of a database: a mark that says which process made it and whether that is alive.

A process id identifies a process on one machine, in one PID namespace (a container has its own),
until a restart, and only together with the time at which the process began. A mark contains all of
these. The name of a host does not identify a machine: many are called localhost. Whether a process
of another machine, or from before a restart, is alive cannot be known.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from uuid import getnode, uuid4

from pgtoolset._postgres.untrusted import json_in

#: The kind that every mark names, so that other JSON in a comment is not taken for one.
_KIND = "pgtoolset worker database"

#: Seconds: no run of tests takes longer.
_LONGEST_RUN = 86400

#: Seconds after which a draft of another machine is abandoned. It is in use for milliseconds.
_DRAFT_AGE = 3600

#: Characters of the longest mark that is read: a mark of ours has some 300.
_LONGEST_MARK = 2000

#: Seconds since 1970: the year 5138.
_LATEST = 10**11

_DRAFT = re.compile(r"pgtoolset-([0-9a-f]{12})-([0-9a-f]+)-([0-9a-f]+)-([0-9a-f]+)-[0-9a-f]{6}")


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, and one of its databases.

    Attributes:
        machine: the host, since its last start, and the PID namespace.
        pid: the process id.
        started: when the process began, in ticks since the start of the machine; 0 where that is
            unknown.
        created: when the mark was made, in seconds since 1970.
        token: unique for each database of the process.
    """

    machine: str
    pid: int
    started: int
    created: int
    token: str

    def mark(self, kind: str = _KIND) -> str:
        """Return the comment for the database, or for what `kind` says."""
        return json.dumps({"kind": kind, **asdict(self)})

    def is_alive(self) -> bool | None:
        """Return whether the process is running, `None` where that cannot be known here."""
        return _is_running(self.pid, self.started) if self.machine == _machine() else None

    def is_over(self, open_tokens: Collection[str]) -> bool:
        """Return whether the block is over that has made this mark.

        Args:
            open_tokens: those of the blocks of this process that are not over.
        """
        alive = self.is_alive()
        if alive:
            return self.pid == os.getpid() and self.token not in open_tokens
        return alive is False or self.is_forgotten()

    def is_forgotten(self) -> bool:
        """Return whether the process is unknown here and the database older than any run."""
        return self.is_alive() is None and time.time() - self.created > _LONGEST_RUN


_FIELDS = {"machine": str, "pid": int, "started": int, "created": int, "token": str}


def new_owner() -> Owner:
    """Return this process as an owner, with the token of a new database."""
    pid = os.getpid()
    return Owner(_machine(), pid, _started(pid) or 0, int(time.time()), uuid4().hex)


def owner_in(comment: str | None, kind: str = _KIND) -> Owner | None:
    """Return the owner that a comment names, `None` where the comment is not a mark."""
    fields = json_in(comment, longest=_LONGEST_MARK)
    if not isinstance(fields, dict) or fields.pop("kind", None) != kind:
        return None
    if {name: type(value) for name, value in fields.items()} != _FIELDS:
        return None
    owner = Owner(**fields)
    return owner if _is_possible(owner.pid, owner.started, owner.created) else None


def _is_possible(pid: int, started: int, created: int) -> bool:
    """Return whether a process can have these numbers; any role can write others."""
    return 0 < pid < 2**31 and 0 <= started < 2**63 and 0 <= created < _LATEST


def draft_name(owner: Owner) -> str:
    """Return the name of an unfinished database. It names the owner: it has no comment yet."""
    return (
        f"pgtoolset-{_digest()}-{owner.pid:x}-{owner.started:x}-{owner.created:x}-{owner.token[:6]}"
    )


def is_forgotten_draft(name: str) -> bool:
    """Return whether this is the name of a draft that no process will finish."""
    match = _DRAFT.fullmatch(name)
    if match is None:
        return False
    pid, started, created = (int(number, 16) for number in match.groups()[1:])
    if not _is_possible(pid, started, created):
        return False
    if match[1] == _digest():
        return not _is_running(pid, started)
    return time.time() - created > _DRAFT_AGE


@cache
def _machine() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        namespace, boot = "", f"{getnode():x}"  # the address of the network card
    return f"{socket.gethostname()} {boot} {namespace}".strip()


def _digest() -> str:
    return blake2b(_machine().encode(), digest_size=6).hexdigest()


def _is_running(pid: int, started: int) -> bool:
    if os.name != "posix":
        return True  # on Windows os.kill would end the process
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now = _started(pid)
    return now is None or now == started


def _started(pid: int) -> int | None:
    """Return when a process began, `None` where that is unknown, -1 for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) if fields[0] not in "ZX" else -1
    except (OSError, IndexError, ValueError):
        return None
