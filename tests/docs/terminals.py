"""A terminal with a shell in it, as a reader of a page has one."""

from __future__ import annotations

import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Self

#: Seconds that a command may take on a busy machine.
LIMIT = 300

#: What the shell prints when it waits for a command, with the status of the last one.
PROMPT = re.compile(r"\[\[done (\d+)\]\]")

COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")

#: Nothing but the output of commands is printed.
PLAIN = {"PS1": "", "PS2": "", "TERM": "dumb", "VIRTUAL_ENV_DISABLE_PROMPT": "1"}

#: Makes standard input the controlling terminal, so that Ctrl-C reaches the running command.
SHELL = """
import fcntl, os, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp("bash", ["bash", "--noprofile", "--norc", "--noediting", "-i"])
"""


class Silence(Exception):
    """The terminal did not print what was waited for."""


class Terminal:
    """A shell in a folder.

    `output` is what has been printed since the last command, without its prompt.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], limit: float = LIMIT) -> None:
        self.output = ""
        self.status: int | None = None
        self._limit = limit
        self._screen, terminal = os.openpty()
        self._shell = subprocess.Popen(
            [sys.executable, "-ISE", "-c", SHELL],
            cwd=folder,
            env={**environment, **PLAIN},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        # A program stops when what it prints is not taken from its terminal.
        self._printed: queue.Queue[bytes] = queue.Queue()
        self._closing, self._close = os.pipe()
        self._pump = threading.Thread(target=self._take_what_is_printed)
        self._pump.start()
        # The quotes keep the prompt out of what the terminal echoes here for the last time.
        self._type(r"stty -echo -onlcr; PROMPT_COMMAND=; PS1='[[do''ne $?]]'" + "\n")
        self.wait_for_prompt()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the shell, and what runs in its terminal."""
        os.write(self._close, b".")
        self._pump.join()
        os.close(self._screen)  # the terminal hangs up
        os.close(self._close)
        os.close(self._closing)
        try:
            self._shell.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._shell.pid, signal.SIGKILL)
            self._shell.wait()

    def _take_what_is_printed(self) -> None:
        while True:
            ready, _, _ = select.select([self._screen, self._closing], [], [])
            if self._closing in ready:
                return
            try:
                self._printed.put(os.read(self._screen, 65536))
            except OSError:  # the shell has ended, and its terminal with it
                self._printed.put(b"")
                return

    def start(self, command: str) -> None:
        """Type a command, of one line or several."""
        self.output, self.status = "", None
        self._type(command + "\n")

    def interrupt(self) -> None:
        """Press Ctrl-C, and wait until the command has ended."""
        self._type("\x03")
        self.wait_for_prompt()

    def wait_for_prompt(self, limit: float | None = None) -> None:
        """Wait until the command has ended; `status` says how."""
        while self.status is None:
            self.read(limit)

    def read(self, limit: float | None = None) -> None:
        """Wait until the terminal prints something.

        Raises:
            Silence: it printed nothing within the limit, in seconds.
        """
        limit = self._limit if limit is None else limit
        try:
            printed = self._printed.get(timeout=limit)
        except queue.Empty:
            raise Silence(f"nothing more in {limit} s than:\n{self.output}") from None
        if not printed:
            raise Silence(f"the shell has ended, after:\n{self.output}")
        self.output += printed.decode(errors="replace")
        self.output = COLOURS.sub("", self.output).replace("\r", "")
        if done := PROMPT.search(self.output):
            self.output, self.status = self.output[: done.start()], int(done[1])

    def _type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())
