"""Run one PostgreSQL server until the process that started this one ends.

    python _supervisor.py DIRECTORY TEMPLATE USER POSTGRES ARGUMENT...

Copy the data directory TEMPLATE to DIRECTORY/data and start POSTGRES on it, as USER where that is
not empty.

The parent process holds the other end of standard input. The line `stop` or `immediate` ends the
server (fast or immediate shutdown), `start` starts it again; the answer to each is the process id
of the server. When standard input closes, for whatever reason, stop the server and delete
DIRECTORY. This file runs as a script, isolated from the environment, so it imports only the
standard library.
"""

import pwd
import shutil
import signal
import subprocess
import sys

#: Seconds that each kind of shutdown may take before the next, harder one.
SHUTDOWN_TIMEOUT = 10.0


def main(directory: str, template: str, user: str, command: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    server: subprocess.Popen[bytes] | None = None
    try:
        subprocess.run(["cp", "-Rp", template, f"{directory}/data"], check=True)
        if user:
            shutil.chown(directory, user)
        with open(f"{directory}/log", "ab") as log:
            server = start(command, user, log.fileno())
            print(server.pid, flush=True)
            for line in sys.stdin:
                match line.strip():
                    case "stop":
                        stop(server, signal.SIGINT)
                    case "immediate":
                        stop(server, signal.SIGQUIT)
                    case "start":
                        server = start(command, user, log.fileno())
                print(server.pid, flush=True)
    finally:
        if server is not None:
            stop(server, signal.SIGINT)
        shutil.rmtree(directory, ignore_errors=True)


def start(command: list[str], user: str, log: int) -> "subprocess.Popen[bytes]":
    if not user:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
    group = pwd.getpwnam(user).pw_gid
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd="/",
        user=user,
        group=group,
        extra_groups=[],
    )


def stop(server: "subprocess.Popen[bytes]", number: int) -> None:
    # A fast shutdown ends the sessions in order, an immediate one does not wait for them, and the
    # kernel stops the server without its help.
    # https://www.postgresql.org/docs/current/server-shutdown.html
    for attempt in (number, signal.SIGQUIT, signal.SIGKILL):
        if server.poll() is None:
            server.send_signal(attempt)
        try:
            server.wait(SHUTDOWN_TIMEOUT)
        except subprocess.TimeoutExpired:
            continue
        return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
