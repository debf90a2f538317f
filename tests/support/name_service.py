"""A host name that one process resolves, until it does not: the C library's resolver, replaced by a few lines."""

import subprocess
from pathlib import Path

from agent.lab.privileges import hand_over

NAME = "store.test"
_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **found)
{
    int (*resolve)(const char *, const char *, const struct addrinfo *, struct addrinfo **);

    *(void **)&resolve = dlsym(RTLD_NEXT, "getaddrinfo");

    if (name != NULL && strcmp(name, NAME) == 0) {
        if (access(BROKEN, F_OK) == 0)
            return EAI_NONAME;
        name = "127.0.0.1";
    }
    return resolve(name, service, hints, found);
}
"""


class NameService:
    """Resolves `NAME` to this machine for processes that get `environment`, while it is not `broken`."""

    def __init__(self, directory: Path) -> None:
        self._broken = directory / "name-service-is-broken"
        library = directory / "resolver.so"
        defines = [f'-DNAME="{NAME}"', f'-DBROKEN="{self._broken}"']
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", *defines, "-x", "c", "-", "-o", library, "-ldl"],
            input=_SOURCE, text=True, check=True,
        )  # fmt: skip
        hand_over(library)
        self.environment = {"LD_PRELOAD": str(library)}

    def fail(self) -> None:
        """Know the name no longer."""
        self._broken.touch()

    def recover(self) -> None:
        """Know the name again."""
        self._broken.unlink()
