"""The programs of the cluster: where they are, how they start, and that none is left behind."""

import asyncio
import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from examples.cluster import keeper
from pgtoolset.errors import EmbeddedServerError
from pgtoolset.testing.server import load_embedded

#: How each program is installed.
DEBIAN = "apt-get install etcd-server haproxy pgbouncer"
PATRONI = 'pip install "pgtoolset[cluster]"'


class MissingProgram(Exception):
    """A program of the cluster is not installed. The message says which, and how to install it."""


@dataclass(frozen=True)
class Programs:
    """Where the programs are, and the user that they run as where this one is root.

    Attributes:
        python: the start of a command that runs this Python as that user.
    """

    etcd: str
    haproxy: str
    pgbouncer: str
    postgres: Path
    python: tuple[str, ...]
    user: str | None


def find_programs() -> Programs:
    """Find every program that the cluster needs.

    Raises:
        MissingProgram: one is not installed.
    """
    if not Path("/proc/self/stat").exists():
        raise MissingProgram("The cluster needs Linux: it stops and ends processes through /proc.")
    etcd, haproxy, pgbouncer = (_find(name) for name in ("etcd", "haproxy", "pgbouncer"))
    if importlib.util.find_spec("patroni") is None:
        raise MissingProgram(f"patroni is not installed: {PATRONI}")
    try:
        # The directory is only read, for what is in it.
        postgres = load_embedded()(Path(tempfile.gettempdir()), postgres_version=18)
    except EmbeddedServerError as error:
        raise MissingProgram(str(error)) from error
    python = _python_of(postgres.system_user, postgres.bin_path)
    return Programs(etcd, haproxy, pgbouncer, postgres.bin_path, python, postgres.system_user)


def _find(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise MissingProgram(f"{name} is not installed: {DEBIAN}")
    return path


def _python_of(user: str | None, postgres: Path) -> tuple[str, ...]:
    """Return how to run this Python as a user, who may have no way to it: it may be in root's home.

    The user then gets the capability to read, which ends with the process.
    See https://man7.org/linux/man-pages/man7/capabilities.7.html
    """
    if user is None:
        return (sys.executable,)
    as_user = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    # Patroni starts both, this Python and PostgreSQL.
    trial = (
        "import patroni, subprocess, sys; "
        "sys.exit(subprocess.call([sys.executable, '-V']) or subprocess.call([sys.argv[1], '-V']))"
    )
    for capability in ("", "+dac_read_search", "+dac_override"):
        more = (f"--inh-caps={capability}", f"--ambient-caps={capability}") if capability else ()
        command = (*as_user, *more, sys.executable)
        tried_command = [*command, "-c", trial, str(postgres / "postgres")]
        try:
            tried = subprocess.run(tried_command, capture_output=True, cwd="/", check=False)
        except FileNotFoundError:
            raise MissingProgram("setpriv is not installed: apt-get install util-linux") from None
        if tried.returncode == 0:
            return command
    raise MissingProgram(
        f"The user {user} cannot run {sys.executable} and {postgres}: make them readable for it."
    )


@contextmanager
def run_directory(user: str | None) -> Iterator[Path]:
    """Yield an empty directory; at the end of the block, or of this process, everything that runs
    in it is killed, and it is deleted."""
    directory = Path(tempfile.mkdtemp(prefix="pgtoolset-cluster-"))
    command = [sys.executable, "-I", "-S", keeper.__file__, str(directory)]
    # Ctrl-C in a terminal reaches a whole process group, so the keeper has one of its own.
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        try:
            if user is not None:
                shutil.chown(directory, user)
            yield directory
        finally:
            keeper.end_all(str(directory))


class Program:
    """A program that runs in the background, with a log of its own.

    Args:
        command: the program and its arguments.
        log: the file that it writes to.
        user: the user that it runs as.
        environment: variables, added to those of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        user: str | None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._command = command
        self._log = log
        self._user = user
        self._environment = os.environ | (environment or {})
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self._environment,
                start_new_session=True,
                user=self._user,
                group=None if self._user is None else pwd.getpwnam(self._user).pw_gid,
                extra_groups=None if self._user is None else [],
            )

    async def ended(self) -> None:
        """Wait until it has ended, after it was killed."""
        assert self._process is not None
        await self._process.wait()

    def last_words(self) -> str:
        """Return the end of its log."""
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""
