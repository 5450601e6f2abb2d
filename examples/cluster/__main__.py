"""Proves on a Patroni cluster that blocks tell the truth through failovers, and prints a picture.

    python -m examples.cluster [--once] [--driver asyncpg|psycopg] [--strict] [--by-hand]

Environment:
    CLUSTER_SECONDS: how long faults are inflicted; 180 without it.
    CLUSTER_ONCE: 1 for the short form, about a minute.
    CLUSTER_DRIVER: asyncpg or psycopg.
    CLUSTER_OPTIONS: more options, as above.
    CLUSTER_LOG: a file for what the drivers, SQLAlchemy and pgtoolset log.

The exit code is 0 when everything that the application was told is true, 1 when something is not,
2 when a program of the cluster is missing or an option is wrong, 130 after Ctrl-C.
"""

import argparse
import asyncio
import logging
import os
import shlex
import signal
import sys

from examples.cluster.picture import draw
from examples.cluster.programs import MissingProgram
from examples.cluster.proof import Options, prove


def main() -> int:
    """Run the proof and return its exit code."""
    # SIGTERM too unwinds what has been started, as Ctrl-C does.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = parse([*shlex.split(os.environ.get("CLUSTER_OPTIONS", "")), *sys.argv[1:]])
    # Lost connections are what this is about: they are logged only where a file is asked for.
    log = os.environ.get("CLUSTER_LOG")
    logging.basicConfig(
        handlers=[logging.FileHandler(log) if log else logging.NullHandler()],
        format="%(asctime)s %(name)s %(message)s",
    )
    try:
        run, complaints = asyncio.run(prove(options, say))
    except MissingProgram as error:
        print(f"The cluster cannot start. {error}", file=sys.stderr)
        return 2
    except TimeoutError as error:
        print(f"The cluster does not work: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(draw(run))
    print()
    for complaint in complaints:
        print(f"DOES NOT HOLD  {complaint}")
    if not complaints:
        print(
            "Everything holds: nothing lost, nothing twice, no wrong outcome, no stale token read."
        )
    return 1 if complaints else 0


def say(line: str) -> None:
    print(line, flush=True)


def parse(arguments: list[str]) -> Options:
    """Return the options of a command line and of the environment."""
    parser = argparse.ArgumentParser(prog="python -m examples.cluster")
    parser.add_argument(
        "--seconds", type=_positive, default=os.environ.get("CLUSTER_SECONDS", "180")
    )
    parser.add_argument("--once", action="store_true", help="the short form, about a minute")
    parser.add_argument(
        "--driver",
        choices=("asyncpg", "psycopg"),
        default=os.environ.get("CLUSTER_DRIVER") or "asyncpg",
    )
    parser.add_argument("--strict", action="store_true", help="synchronous_mode_strict")
    parser.add_argument("--by-hand", action="store_true", help="judge SQLAlchemy by hand, too")
    parser.add_argument(
        "--resume",
        type=_positive,
        help="seconds until writes go on; 2, and with psycopg 4, which waits for a silent host for"
        " 2 at least",
    )
    given = parser.parse_args(arguments)
    once = given.once or os.environ.get("CLUSTER_ONCE", "") not in ("", "0")
    resume = given.resume or (4.0 if given.driver == "psycopg" else 2.0)
    return Options(
        0.0 if once else given.seconds, given.driver, given.strict, given.by_hand, resume
    )


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
