"""PgBouncer, in transaction mode unless a test asks for another, before the server of a URL."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import make_url

from tests.support import DRIVER

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

#: Backends for all clients together: fewer than there are clients, so that these share them.
BACKENDS = 2

#: The arguments of the driver with which nothing depends on the backend that it met last.
WITHOUT_CACHES: dict[str, Any] = (
    {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"pgtoolset_{uuid4()}",
    }
    if DRIVER == "asyncpg"
    else {"prepare_threshold": None}
)


@asynccontextmanager
async def pgbouncer(
    url: str, backends: int = BACKENDS, *, pool_mode: str = "transaction"
) -> AsyncIterator[str]:
    """Yield a URL of the same database through PgBouncer, which runs as the owner of the server's
    socket. Where there is no PgBouncer, the test is skipped."""
    if PROGRAM is None:
        pytest.skip("pgbouncer is not installed (apt-get install pgbouncer)")
    behind = make_url(url)
    host = behind.query.get("host") or behind.host
    assert isinstance(host, str)
    user = pwd.getpwuid(os.stat(host).st_uid if host.startswith("/") else os.getuid()).pw_name
    if os.getuid() == 0 and user == "root":
        user = "nobody"
    directory = Path(tempfile.mkdtemp(prefix="pgtoolset-pgbouncer-"))
    try:
        password = f" password='{behind.password}'" if behind.password else ""
        (directory / "pgbouncer.ini").write_text(
            f"""
[databases]
* = host={host} port={behind.port or 5432} user={behind.username}{password}

[pgbouncer]
pool_mode = {pool_mode}
default_pool_size = {backends}
auth_type = any
listen_addr =
listen_port = 6432
unix_socket_dir = {directory}
"""
        )
        command = [PROGRAM, "-q", str(directory / "pgbouncer.ini")]
        if os.getuid() == 0:
            shutil.chown(directory, user)
            shutil.chown(directory / "pgbouncer.ini", user)
            command[1:1] = ["-u", user]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        try:
            async with asyncio.timeout(10):
                while not (directory / ".s.PGSQL.6432").exists():
                    assert process.returncode is None, await process.communicate()
                    await asyncio.sleep(0.02)
            yield f"{behind.drivername}://{behind.username}@/{behind.database}?host={directory}&port=6432"
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()
    finally:
        shutil.rmtree(directory)
