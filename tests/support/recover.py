"""A program for the tests of the postmaster, which does not run as root: `recover.py POSTGRES DIRECTORY`.

It runs PostgreSQL in a hydrated directory through recovery, prints what came of it as one JSON object and exits like
`pitr`. SIGTERM cancels it.
"""

import asyncio
import dataclasses
import json
import signal
import sys
from pathlib import Path

from agent.errors import AgentError
from agent.postgres.postmaster import Postmaster
from agent.telemetry.logging import configure_logging


async def recover(program: Path, data_directory: Path) -> None:
    """Do what the module's first line says, without the exit code."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    result = await Postmaster(program, data_directory, {}).recover(lambda _: None)
    print(json.dumps(dataclasses.asdict(result), default=str))


def main() -> int:
    """Run `recover` with the program's arguments; return the exit code."""
    program, data_directory = map(Path, sys.argv[1:])
    configure_logging("debug", sys.stderr)
    try:
        asyncio.run(recover(program, data_directory))
    except AgentError as error:
        print(json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint}))
        return error.exit_code
    except asyncio.CancelledError:
        print(json.dumps({"error": "CancelledError"}))
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(main())
