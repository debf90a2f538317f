"""Run a command that ends when its parent does: `end_with_parent.py PARENT COMMAND ARGUMENT...`.

The command keeps this process's pid. When the process PARENT (the one that starts this) dies, however that happens,
the kernel sends the command SIGINT: a server without the agent that serves its restore_command has nothing to do, and
must not promote itself after its agent has gone. It is a program of its own because this must happen between fork and
exec, where a process with threads may run no Python. Source: prctl(2), PR_SET_PDEATHSIG.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Do what the module's first line says; returns only if the parent is gone already."""
    parent, *command = arguments
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    if os.getppid() == int(parent):
        os.execv(command[0], command)  # noqa: S606 - an argument list, no shell: that is the purpose


if __name__ == "__main__":
    main(sys.argv[1:])
