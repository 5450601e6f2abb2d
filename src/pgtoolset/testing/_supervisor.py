"""Run one PostgreSQL server until the process that started this one ends.

    python _supervisor.py DIRECTORY TEMPLATE USER RECORDS POSTGRES ARGUMENT...

Copy the data directory TEMPLATE to DIRECTORY/data and start POSTGRES on it, as USER where that is
not empty. RECORDS is a folder with a file for each server that runs.

The parent process holds the other end of standard input. The first line is the SCRAM verifier of
the password for TCP, or empty, which allows no connection over TCP. The line `stop` or `immediate`
ends the server (fast or immediate shutdown), `start` starts it again; the answer to each is the
process id of the server. When standard input closes or the parent ends, stop the server and delete
DIRECTORY.

This process may be killed itself. On Linux the kernel then ends the server. Elsewhere, and for what
is left in DIRECTORY, the parent's `EmbeddedServer.stop` or the next supervisor does it: a record
that no process locks is that of a killed supervisor.

This file runs as a script, isolated from the environment, so it imports only the standard library.
"""

import fcntl
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

#: Seconds that each kind of shutdown may take before the next, harder one.
SHUTDOWN_TIMEOUT = 10.0

#: Seconds between two looks whether the parent process is alive.
_PARENT_INTERVAL = 1.0

#: Only the owner of the directory reaches the socket. Over TCP any user of the machine can ask.
#: https://www.postgresql.org/docs/current/auth-pg-hba-conf.html
_SOCKET_RULES = "local all all trust\nlocal replication all trust\n"
_TCP_RULES = (
    "host all all 127.0.0.1/32 scram-sha-256\nhost replication all 127.0.0.1/32 scram-sha-256\n"
)

#: From linux/prctl.h.
_PR_SET_PDEATHSIG = 1

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


class Server:
    """PostgreSQL as a child process.

    Args:
        command: POSTGRES and its arguments.
        user: the user that it runs as, where that is another one.
        log: the descriptor that it writes its log to.
    """

    def __init__(self, command: list[str], user: str, log: int) -> None:
        self._command = command
        self._log = log
        self._identity: dict[str, object] = {}
        if user:
            group = pwd.getpwnam(user).pw_gid
            self._identity = {"user": user, "group": group, "extra_groups": []}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def set_password(self, verifier: str) -> None:
        """Store the password of the role postgres, in single-user mode: no port is open yet."""
        settings = ("fsync=off", "log_statement=none", "log_min_error_statement=panic")
        process = self._spawn(
            [
                *(self._command[0], "--single", *self._command[1:3]),
                *(argument for each in settings for argument in ("-c", each)),
                "postgres",
            ],
            subprocess.PIPE,
        )
        process.communicate(f"ALTER ROLE postgres PASSWORD '{verifier}'\n".encode())

    def start(self) -> None:
        self._process = self._spawn(self._command, subprocess.DEVNULL)

    def stop(self, number: int) -> None:
        # A fast shutdown ends the sessions in order, an immediate one does not wait for them, and
        # the kernel stops the server without its help.
        # https://www.postgresql.org/docs/current/server-shutdown.html
        for attempt in (number, signal.SIGQUIT, signal.SIGKILL):
            if self._process is None:
                return
            if self._process.poll() is None:
                self._process.send_signal(attempt)
            try:
                self._process.wait(SHUTDOWN_TIMEOUT)
            except subprocess.TimeoutExpired:
                continue
            return

    def _spawn(self, command: list[str], stdin: int) -> "subprocess.Popen[bytes]":
        output: dict[str, object] = {"stdin": stdin, "stdout": self._log, "stderr": self._log}
        # The function called before exec runs after the change of the user, which would undo it.
        options = output | self._identity | {"cwd": "/", "preexec_fn": _tied()}
        return subprocess.Popen(command, **options)  # type: ignore[call-overload, no-any-return]


def main(directory: str, template: str, user: str, records: str, command: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    lines = _lines(os.getppid())
    record = claim(records, directory)
    server: Server | None = None
    try:
        verifier = next(lines, "")
        subprocess.run(
            ["cp", "-Rp", template, f"{directory}/data"], check=True, stdin=subprocess.DEVNULL
        )
        log = _prepare(directory, user, _SOCKET_RULES + _TCP_RULES * bool(verifier))
        server = Server(command, user, log)
        if verifier:
            server.set_password(verifier)
        server.start()
        print(server.pid, flush=True)
        sweep(records)
        for line in lines:
            match line:
                case "stop":
                    server.stop(signal.SIGINT)
                case "immediate":
                    server.stop(signal.SIGQUIT)
                case "start":
                    server.start()
            print(server.pid, flush=True)
    finally:
        if server is not None:
            server.stop(signal.SIGINT)
        shutil.rmtree(directory, ignore_errors=True)
        if record is not None:
            os.unlink(record)


def _lines(parent: int) -> Iterator[str]:
    """Yield the lines of standard input until it closes or the parent process ends.

    A process that the parent has forked may keep the other end open for longer than the parent.
    """
    rest = b""
    while os.getppid() == parent:
        if not select.select([0], [], [], _PARENT_INTERVAL)[0]:
            continue
        chunk = os.read(0, 4096)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode().strip()


def _prepare(directory: str, user: str, rules: str) -> int:
    """Write the rules of access, open the log, and give the directory to the user, in this order.

    Afterwards the user could put a link in the place of a file that this process opens as root.
    """
    access, log = (_created(f"{directory}/{name}", user) for name in ("pg_hba.conf", "log"))
    os.write(access, rules.encode())
    os.close(access)
    if user:
        shutil.chown(directory, user)
    return log


def _created(path: str, user: str) -> int:
    file = os.open(path, _NEW, 0o600)
    if user:
        owner = pwd.getpwnam(user)
        os.fchown(file, owner.pw_uid, owner.pw_gid)
    return file


def _tied() -> Callable[[], None] | None:
    """Return what ties a child process to this one: on Linux it gets SIGQUIT when this one ends.

    The kernel counts the thread that has forked as the parent, and this process has only one.
    https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
    """
    if sys.platform != "linux":
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    supervisor = os.getpid()

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGQUIT), 0, 0, 0)
        if os.getppid() != supervisor:
            os.kill(os.getpid(), signal.SIGKILL)  # it ended before the call

    return tie


def claim(records: str, directory: str) -> str | None:
    """Record that this process has a server in a directory; return the path of the record.

    The record is locked while this process lives. Where none can be written (a cache that
    is read-only, a file system without locks), the result is `None`, and no sweep finds the server.
    """
    path = os.path.join(records, os.path.basename(directory))
    try:
        os.makedirs(records, 0o700, exist_ok=True)
        # Renamed once it is locked, so a record without a lock is never that of a living process.
        descriptor = os.open(f"{path}.new", _NEW, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, directory.encode())
        os.rename(f"{path}.new", path)
    except OSError:
        return None
    return path


def sweep(records: str) -> None:
    """End the servers that killed supervisors have left, and delete their directories."""
    with suppress(OSError):
        for name in os.listdir(records):
            if not name.endswith(".new"):
                with suppress(OSError):  # its supervisor is alive, or another process was faster
                    _sweep_one(os.path.join(records, name))


def _sweep_one(record: str) -> None:
    with open(record, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        end_left_over(file.read())
        os.unlink(record)


def end_left_over(directory: str) -> None:
    """End the server in the directory of a supervisor that was killed, and delete the directory."""
    for number in (signal.SIGQUIT, signal.SIGKILL):
        pid = _server_in(directory)
        if pid is None:
            break
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT
        while _server_in(directory) == pid and time.monotonic() < deadline:
            time.sleep(0.02)
    shutil.rmtree(directory, ignore_errors=True)


def _server_in(directory: str) -> int | None:
    """Return the process id of the server that runs on a directory, `None` where none does."""
    pid = end_of_file(f"{directory}/data/postmaster.pid").partition("\n")[0].strip()
    if not pid.isdecimal() or not 1 < int(pid) < 2**31:
        return None
    # The file may have outlived the server, and another process have its id now.
    return int(pid) if f"{directory}/data" in _command_line(pid) else None


def end_of_file(path: str) -> str:
    """Return the end of a file that another user may own; "" where it is not a plain file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return file.read(4096).decode(errors="replace")
    except OSError:
        return ""


def _command_line(pid: str) -> str:
    if os.path.exists("/proc/self/cmdline"):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                return file.read().decode(errors="replace").replace("\0", " ")
        except OSError:
            return ""
    command = ["ps", "-ww", "-o", "args=", "-p", pid]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
