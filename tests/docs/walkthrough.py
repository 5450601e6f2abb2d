"""Do what a page says, by its words alone: write its files, type its commands, compare the output.

A page shows:

- a file: a block that begins with `# its/path`. A block of `diff` changes a file that is there.
- a terminal: a block of `console` that begins with `# terminal: name`. A line `$ command` is
  typed, `^C` is pressed, and every other line must be printed. `...` in a line stands for any text,
  and a line of its own for any lines. A command with `...` is the last printed line that fits. A
  block without a command goes on where the last one has ended.

The last command of a terminal other than `commands` may go on running.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.docs.terminals import LIMIT, Silence, Terminal

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w./-]+)\n")
TERMINAL = re.compile(r"# terminal: (\w+)\n")

#: The terminal whose commands all end.
COMMANDS = "commands"

DOTS = "..."


class Mistake(Exception):
    """The page says what does not happen, or what cannot be done."""


@dataclass
class Step:
    """What a page shows in one block, with the number of its first line."""

    line: int
    language: str
    text: str

    @property
    def terminal(self) -> str | None:
        named = TERMINAL.match(self.text)
        return named[1] if named else None

    @property
    def file(self) -> str:
        named = FILE.match(self.text)
        if named is None:
            raise Mistake(f"line {self.line}: the block names no file")
        return named[1]


def steps_of(page: str) -> list[Step]:
    """The blocks of a page, in order."""
    return [
        Step(page[: block.start()].count("\n") + 2, block[1], block[2])
        for block in BLOCK.finditer(page)
    ]


def changed(content: str, change: str) -> str:
    """Apply the lines of a diff, whose first one is left out, to the one place that they fit."""
    lines = change.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    places = [at for at in (content.find(old), content.rfind(old)) if at >= 0]
    if len(set(places)) != 1 or not (places[0] == 0 or content[places[0] - 1] == "\n"):
        raise Mistake(f"these lines are not there, or more than once:\n{old}")
    return content.replace(old, new)


def pattern_of(lines: list[str]) -> re.Pattern[str]:
    """The pattern that output must match from its beginning."""
    parts = [
        r"(?:.*\n)*?" if line == DOTS else re.escape(line).replace(r"\.\.\.", ".*") + r" *\n"
        for line in lines
    ]
    return re.compile("".join(parts))


@dataclass
class Reader:
    """Someone who does what a page says, in a folder.

    Args:
        folder: where the terminals open, empty.
        project: the folder that the files are in, once the page has made it.
        environment: of the shells.
        replaced: text of the page that is another one here, in commands and in output.
        limit: seconds to wait for output.
        patience: seconds that a command may still run at the end of the page.
    """

    folder: Path
    project: str
    environment: dict[str, str]
    replaced: dict[str, str] = field(default_factory=dict)
    limit: float = LIMIT
    patience: float = LIMIT

    def __enter__(self) -> Self:
        self._terminals: dict[str, Terminal] = {}
        self._printed: list[str] = []
        self._stack = ExitStack().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def follow(self, page: str) -> int:
        """Do all that a page says, and return how many commands that were.

        Raises:
            Mistake: something is not as the page says.
        """
        for text, ours in self.replaced.items():
            page = page.replace(text, ours)
        commands = 0
        for step in steps_of(page):
            try:
                if step.language == "console":
                    commands += self._do(step)
                else:
                    self._write(step)
            except (Mistake, Silence) as error:
                raise Mistake(f"line {step.line}: {error}") from None
        for name, terminal in self._terminals.items():
            try:
                terminal.wait_for_prompt(self.patience)
            except Silence as error:
                raise Mistake(f"at the end a command still runs in {name}: {error}") from None
        return commands

    def _write(self, step: Step) -> None:
        path = self.folder / self.project / step.file
        if not (self.folder / self.project).is_dir():
            raise Mistake(f"there is no folder {self.project} yet")
        if step.language == "diff":
            if not path.exists():
                raise Mistake(f"{step.file} is not there yet")
            path.write_text(changed(path.read_text(), step.text.partition("\n")[2]))
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(step.text)

    def _do(self, step: Step) -> int:
        name = step.terminal
        if name is None:
            raise Mistake("the block names no terminal")
        if name not in self._terminals:
            opened = Terminal(self.folder, self.environment, self.limit)
            self._terminals[name] = self._stack.enter_context(opened)
        terminal = self._terminals[name]
        body = step.text.partition("\n")[2]
        first, *rest = re.split(r"^\$ ", body, flags=re.MULTILINE)
        lines = first.splitlines()
        if lines[:1] == ["^C"]:
            terminal.interrupt()
            lines = lines[1:]
        if lines:
            self._expect(terminal, lines, ends=False)
        for number, command in enumerate(rest, 1):
            self._run(terminal, command, ends=name == COMMANDS or number < len(rest))
        return len(rest)

    def _run(self, terminal: Terminal, shown: str, *, ends: bool) -> None:
        command, _, output = shown.partition("\n")
        if terminal.status is None:
            raise Mistake(f"the terminal is busy, so nothing can be typed: {command}")
        terminal.start(self._filled(command))
        self._expect(terminal, output.splitlines(), ends=ends)
        if ends and terminal.status != 0:
            raise Mistake(f"{command} ended with status {terminal.status}:\n{terminal.output}")

    def _expect(self, terminal: Terminal, lines: list[str], *, ends: bool) -> None:
        """Wait until a terminal has printed these lines, and where the command ends, no other."""
        pattern = pattern_of(lines)
        if ends:
            terminal.wait_for_prompt()
        while True:
            printed = terminal.output
            if terminal.status is not None:  # the last line of curl has no end
                pattern = pattern_of("\n".join(lines).rstrip("\n").splitlines())
                printed = printed.rstrip("\n") + "\n" * bool(printed.strip("\n"))
            found = pattern.fullmatch(printed) if ends else pattern.match(printed)
            if found is not None:
                self._printed += found[0].splitlines()
                terminal.output = printed[found.end() :]
                return
            if terminal.status is not None:
                expected = "\n".join(lines)
                raise Mistake(f"expected:\n{expected}\nprinted:\n{printed}")
            terminal.read()

    def _filled(self, command: str) -> str:
        if DOTS not in command:
            return command
        pattern = re.compile(re.escape(command).replace(r"\.\.\.", ".*"))
        for line in reversed(self._printed):
            if pattern.fullmatch(line):
                return line
        raise Mistake(f"nothing on the page has printed what the dots stand for in: {command}")
