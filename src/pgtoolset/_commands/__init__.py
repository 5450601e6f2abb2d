"""The commands of `pgtoolset`, by name."""

from pgtoolset._commands import locks, watch
from pgtoolset._commands._command import CONNECTION, Command, CommandError

__all__ = ["COMMANDS", "CONNECTION", "CommandError"]

COMMANDS: dict[str, Command] = {
    "locks": locks,
    "watch": watch,
}
