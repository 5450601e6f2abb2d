"""Print the table that the programs observe: `build/comparison/bin/python -m tests.comparison`."""

import asyncio
import sys

from pgtoolset.testing import EmbeddedServer
from tests.comparison.observe import observed
from tests.comparison.promises import PROMISES
from tests.comparison.stacks import STACKS

WORDS = {True: "yes", False: "no", None: "-"}


async def main(wanted: list[str]) -> None:
    with EmbeddedServer() as server:
        for promise in PROMISES.values():
            if wanted and promise.program.__name__ not in wanted:
                continue
            words = [WORDS[await observed(promise, stack, server.url())] for stack in STACKS]
            sys.stdout.write(f"| {promise.title} | {' | '.join(words)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
