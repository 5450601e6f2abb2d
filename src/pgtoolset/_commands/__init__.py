"""The commands of `pgtoolset`, by name."""

from pgtoolset._commands import doctor, locks, watch
from pgtoolset._commands._command import Command, CommandError, OutputError

__all__ = ["COMMANDS", "CommandError", "OutputError"]

COMMANDS: dict[str, Command] = {
    "locks": locks,
    "watch": watch,
    "doctor": doctor,
}
