"""Who waits for whom, as a tree: a session stands below the last of those that it waits for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from examples.shop.settings import Settings
from pgtoolset import LockWait, list_lock_waits

ACTIVITY = text(
    "SELECT pid, application_name, state, query FROM pg_catalog.pg_stat_activity "
    "WHERE pid = ANY(:pids)"
)


@dataclass
class Node:
    """A session, with those that wait for it below."""

    pid: int
    who: str
    what: str
    seconds: float | None = None
    waiting: list["Node"] = field(default_factory=list)


async def lock_tree(connection: AsyncConnection, settings: Settings) -> list[dict[str, object]]:
    """The sessions of this shop that wait for a lock, below the ones that do not wait. A session of
    another program is in it where one of the shop waits for it."""
    waits = chains(await list_lock_waits(connection), settings)
    if not waits:
        return []
    pids = {pid for wait in waits for pid in wait.blocked_by} - {wait.pid for wait in waits}
    nodes = {wait.pid: waiting_node(wait, settings) for wait in waits}
    for pid, name, state, query in await connection.execute(ACTIVITY, {"pids": sorted(pids)}):
        nodes[pid] = Node(pid, who(name, settings), f"{state or 'not shown'}{statement(query)}")
    return [asdict(node) for node in grown(nodes, waits)]


def chains(waits: Sequence[LockWait], settings: Settings) -> list[LockWait]:
    """The waits of this shop, and those that stand between them and who does not wait."""
    by_pid = {wait.pid: wait for wait in waits}
    ours = [wait.pid for wait in waits if (wait.application_name or "").startswith(settings.schema)]
    chained: dict[int, LockWait] = {}
    while ours:
        pid = ours.pop(0)
        if pid in by_pid and pid not in chained:
            chained[pid] = by_pid[pid]
            ours.extend(by_pid[pid].blocked_by)
    return list(chained.values())


def grown(nodes: dict[int, Node], waits: Sequence[LockWait]) -> list[Node]:
    """Hang each session below the last one in the queue before it; return those that hang below
    none."""
    depth = depths(waits)
    roots = {pid: node for pid, node in nodes.items() if pid not in depth}
    for wait in sorted(waits, key=lambda wait: depth[wait.pid]):
        # In a deadlock, until PostgreSQL ends it, nobody is before all others.
        before = [pid for pid in wait.blocked_by if depth.get(pid, 0) < depth[wait.pid]]
        before = [pid for pid in before if pid in nodes]
        if before:
            parent = max(before, key=lambda pid: depth.get(pid, 0))
            nodes[parent].waiting.append(nodes[wait.pid])
        else:
            roots[wait.pid] = nodes[wait.pid]
    return list(roots.values())


def depths(waits: Sequence[LockWait]) -> dict[int, int]:
    """How many sessions stand before each that waits, one behind the other."""
    blocked_by = {wait.pid: wait.blocked_by for wait in waits}

    def depth(pid: int, path: frozenset[int]) -> int:
        behind = [each for each in blocked_by.get(pid, ()) if each not in path]
        return 1 + max((depth(each, path | {each}) for each in behind), default=-1)

    return {pid: depth(pid, frozenset({pid})) for pid in blocked_by}


def waiting_node(wait: LockWait, settings: Settings) -> Node:
    """A session that waits."""
    relation = (wait.relation or "").rpartition(".")[2]
    what = f"{wait.mode or 'a lock'}{f' on {relation}' if relation else ''}{statement(wait.query)}"
    seconds = None if wait.waiting_for is None else wait.waiting_for.total_seconds()
    return Node(wait.pid, who(wait.application_name, settings), what, seconds)


def who(application_name: str | None, settings: Settings) -> str:
    """What the page calls a session."""
    names = {
        settings.application_name: "a request of the shop",
        settings.page_name: "another session",
        settings.watcher_name: "the watcher",
        settings.reader_name: "this page, to read",
    }
    return names.get(application_name or "", "a session of another program")


def statement(query: str | None) -> str:
    """The beginning of a statement, in one line. `lock_tables` sends a block of code; what it asks
    for stands before it."""
    line = " ".join((query or "").split())
    if not line or line.startswith("DO "):
        return ""
    return f": {line}" if len(line) <= 80 else f": {line[:79]}…"
