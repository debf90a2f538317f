"""Become an ordinary user, then a command: `run_unprivileged.py USER NEEDED... -- COMMAND ARGUMENT...`.

A program of its own, of the standard library alone, because what it does must happen between fork and exec, where a
process with threads may run no Python. It keeps its pid, its standard streams and its working directory.

The user must be able to use every NEEDED path and to execute COMMAND. Where the permissions above them forbid it (a
checkout below a directory of mode 0700 that belongs to root), the weakest capability that helps is kept across the
change of user: CAP_DAC_READ_SEARCH, else CAP_DAC_OVERRIDE. Source: capabilities(7), "Ambient capability set".

Exit codes before COMMAND runs: 125 the user cannot be changed to, 126 COMMAND cannot be reached or executed.
"""

import ctypes
import os
import pwd
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# Source: linux/capability.h, linux/prctl.h, linux/securebits.h
_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2
_CAPABILITY_VERSION_3 = 0x20080522
_PR_GET_SECUREBITS = 27
_PR_SET_SECUREBITS = 28
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_SECBIT_NO_SETUID_FIXUP = 1 << 2


def _may_use(path: str) -> bool:
    """Tell whether this process may read `path`, and enter it if it is a directory, execute it if it is a program."""
    return os.access(path, os.R_OK) and (not Path(path).stat().st_mode & 0o111 or os.access(path, os.X_OK))


def _unreachable(command: str, needed: Sequence[str]) -> str | None:
    """Return the first path that this process may not use as it must, or None if there is none."""
    if not os.access(command, os.X_OK):
        return command
    return next((path for path in needed if not _may_use(path)), None)


def _call(function: str, *arguments: object) -> int:
    """Call a function of the C library; raise OSError if it returns -1."""
    result: int = getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


def _set_capabilities(mask: int, *, permitted: int) -> None:
    """Make `mask` this process's effective and inheritable capabilities, and `permitted` those it may still take."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)(mask, permitted, mask))


def _permitted_capabilities() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapPrm:"))


def _keep_capability(uid: int, command: str, needed: Sequence[str]) -> None:
    """Change from root to `uid`, keeping the weakest capability that makes `command` and `needed` reachable.

    NO_SETUID_FIXUP rather than KEEP_CAPS: without it access(2), by which PostgreSQL's programs find one another,
    looks with no capability at all. Source: access_override_creds() in Linux's fs/open.c.
    """
    bits = _call("prctl", _PR_GET_SECUREBITS, 0, 0, 0, 0) | _SECBIT_NO_SETUID_FIXUP
    _call("prctl", _PR_SET_SECUREBITS, bits, 0, 0, 0)
    os.setresuid(uid, uid, uid)
    candidates = (1 << _CAP_DAC_READ_SEARCH | 1 << _CAP_DAC_OVERRIDE) & _permitted_capabilities()
    for capability in (_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE):
        mask = candidates & 1 << capability
        _set_capabilities(mask, permitted=candidates)
        if mask and _unreachable(command, needed) is None:
            _set_capabilities(mask, permitted=mask)
            _call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0)
            return
    raise PermissionError("neither CAP_DAC_READ_SEARCH nor CAP_DAC_OVERRIDE is to be had, or helps")


def _become(user: pwd.struct_passwd, command: str, needed: Sequence[str]) -> None:
    os.initgroups(user.pw_name, user.pw_gid)
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, 0)  # root is kept in reserve while this user's own permissions are tried
    blocked = _unreachable(command, needed)
    if blocked is None:
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
        return
    os.setresuid(0, 0, 0)
    try:
        _keep_capability(user.pw_uid, command, needed)
    except OSError as error:
        _fail(
            126, f'user "{user.pw_name}" may not use {blocked} ({error})', "Let others read and enter it: chmod o+rX."
        )


def _set_environment(user: pwd.struct_passwd) -> None:
    """Make HOME and TMPDIR directories that the user may write to, and forget root's own XDG directories."""
    for name in [name for name in os.environ if name.startswith("XDG_")]:
        del os.environ[name]
    if not os.access(os.environ.get("TMPDIR", "/"), os.W_OK | os.X_OK):
        os.environ.pop("TMPDIR", None)
    usable_home = os.access(user.pw_dir, os.W_OK | os.X_OK)
    os.environ["HOME"] = user.pw_dir if usable_home else tempfile.gettempdir()
    os.environ["USER"] = os.environ["LOGNAME"] = user.pw_name


def _fail(code: int, what: str, hint: str) -> NoReturn:
    sys.stderr.write(f"cannot run without root's privileges: {what}. {hint}\n")
    raise SystemExit(code)


def main(arguments: list[str]) -> NoReturn:
    """Do what the module's first lines say; does not return."""
    split = arguments.index("--")
    name, *needed = arguments[:split]
    command = arguments[split + 1 :]
    try:
        user = pwd.getpwnam(name)
        _become(user, command[0], needed)
        _set_environment(user)
    except (KeyError, OSError) as error:
        _fail(125, f'cannot become user "{name}" ({error})', "Run it as an ordinary user.")
    try:
        os.execv(command[0], command)  # noqa: S606 - an argument list, no shell: that is the purpose
    except OSError as error:
        _fail(126, f"cannot execute {command[0]} ({error.strerror})", "Check that it is there and executable.")


if __name__ == "__main__":
    main(sys.argv[1:])
