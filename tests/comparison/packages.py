"""What each of them brings at all: a row is true where its package defines such a name.

What pgtoolset promises about these is proven by its own tests.
"""

import importlib.metadata
from importlib.util import find_spec

from tests.comparison.promises import counterparts, promise
from tests.comparison.stacks import ByHand, SQLModel, Stack


@promise(in_database=False)
async def plugin(stack: Stack) -> bool:
    """A pytest plugin comes with it."""
    points = importlib.metadata.distribution(stack.distribution).entry_points
    return any(point.group == "pytest11" for point in points)


def has(stack: Stack, pattern: str) -> bool:
    """Whether the stack's package defines such a name."""
    return bool(counterparts(type(stack), pattern))


@promise(in_database=False)
async def replicas(stack: Stack) -> bool:
    """Reads go to standbys."""
    return has(stack, r"\w*(Replicas|RoutingConfig)")


@promise(in_database=False)
async def own_writes(stack: Stack) -> bool:
    """A later request reads on a standby what an earlier one has written, by a token."""
    return has(stack, r"ReadReplicas|\w*replayed\w*")


@promise(in_database=False)
async def crud(stack: Stack) -> bool:
    """CRUD classes or repositories."""
    return has(stack, r"CrudFactory|\w*Repository|AsyncCrud")


@promise(in_database=False)
async def pagination(stack: Stack) -> bool:
    """Pagination and filters from the query string."""
    return has(stack, r"\w*OffsetPagina\w+")


@promise(in_database=False)
async def mixins(stack: Stack) -> bool:
    """Mixins for common columns: UUID keys, time of creation and update."""
    return has(stack, r"UUID\w*Mixin|UUIDv7\w*|UUIDPrimaryKey|UUIDAuditBase")


@promise(in_database=False)
async def synchronous(stack: Stack) -> bool:
    """Synchronous sessions."""
    return isinstance(stack, ByHand | SQLModel) or has(stack, r"\w*SyncConfig|SyncSession\w*")


@promise(in_database=False)
async def one_class(stack: Stack) -> bool:
    """One class is the table and the schema of the API."""
    return has(stack, "SQLModel")


@promise(in_database=False)
async def frameworks(stack: Stack) -> bool:
    """Extensions for Litestar, Flask, Sanic and Starlette."""
    if find_spec(f"{stack.package}.extensions") is None:
        return False
    return all(
        find_spec(f"{stack.package}.extensions.{name}") is not None
        for name in ("litestar", "flask", "sanic", "starlette")
    )


@promise(in_database=False)
async def migrations(stack: Stack) -> bool:
    """Commands that run Alembic."""
    return has(stack, "AlembicCommands")


@promise(in_database=False)
async def seeds(stack: Stack) -> bool:
    """Loading of seed data."""
    return has(stack, r"load_fixtures|open_fixture\w*")


@promise(in_database=False)
async def doubles(stack: Stack) -> bool:
    """Doubles of sessions, locks and watching for tests without a database."""
    return has(stack, r"MemorySession|\w*MockSession|\w*MockRepository") and has(
        stack, "MemoryLocks"
    )


@promise(in_database=False)
async def upserts(stack: Stack) -> bool:
    """Upserts by one call."""
    return has(stack, "upsert(_many)?")


@promise(in_database=False)
async def types(stack: Stack) -> bool:
    """Column types for encrypted values, passwords and stored files."""
    return has(stack, "EncryptedString") and has(stack, "StoredObject|FileObject")


@promise(in_database=False)
async def logs(stack: Stack) -> bool:
    """Set-up of logging and of Prometheus metrics."""
    return has(stack, "configure_logging") and has(stack, "init_metrics")
