"""What `doctor` reports: findings, notes, and the server that they are about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pgtoolset._text import one_line

__all__ = ["ERROR", "INFO", "WARNING", "Finding", "Report", "Severity", "listed", "plural"]

#: An `error` breaks something now, or lets another role do so; a `warning` will, or costs; an
#: `info` is a note, and no finding.
Severity: TypeAlias = Literal["error", "warning", "info"]

ERROR: Severity = "error"
WARNING: Severity = "warning"
INFO: Severity = "info"

_SEVERITIES = (ERROR, WARNING, INFO)

#: Names that a message lists.
_LISTED = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know, and what to do.

    Attributes:
        severity: how bad it is.
        name: of its kind, for programs: it stays the same.
        message: a description, on one line.
        advice: what to do, on one line.
    """

    severity: Severity
    name: str
    message: str
    advice: str

    def __post_init__(self) -> None:
        # Names of tables, roles and applications, queries and errors are other people's texts.
        object.__setattr__(self, "message", one_line(self.message))
        object.__setattr__(self, "advice", one_line(self.advice))


@dataclass(frozen=True, slots=True)
class Report:
    """The result of an examination.

    Attributes:
        server: what answered, and over what.
        findings: errors, then warnings.
        notes: what changes no exit code.
    """

    server: dict[str, Any]
    findings: list[Finding]
    notes: list[Finding]

    @classmethod
    def of(cls, server: dict[str, Any], found: list[Finding]) -> Report:
        """Return a report in which the worst stands first."""
        ordered = sorted(found, key=lambda each: _SEVERITIES.index(each.severity))
        return cls(
            server,
            [each for each in ordered if each.severity != INFO],
            [each for each in ordered if each.severity == INFO],
        )


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def listed(names: list[str]) -> str:
    """Return names as a message lists them: the first ones, and how many more there are."""
    shown = ", ".join(names[:_LISTED])
    more = len(names) - _LISTED
    return f"{shown} and {more:,} more" if more > 0 else shown
