"""How settings are written in the environment: sizes, times, schedules, keys, secrets.

Each function raises `ConfigError` that names the setting which is malformed. Which ones there are is declared in
`agent.settings`.
"""

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import SplitResult, urlsplit

from agent.domain.backup_schedule import BackupSchedule, cron_problem
from agent.domain.encryption_key import make_key, trim_key_file
from agent.domain.restore_target import is_number, parse_bool
from agent.errors import ConfigError

_SIZE = re.compile(r"(\d+)\s*(B|KB|KIB|MB|MIB|GB|GIB)?", re.IGNORECASE)
_UNITS = {
    "": 1, "B": 1, "KB": 1000, "KIB": 1 << 10, "MB": 1000**2, "MIB": 1 << 20, "GB": 1000**3, "GIB": 1 << 30
}  # fmt: skip
# Other ways in which WAL-G encrypts. What it would encrypt must not be stored plain.
_OTHER_ENCRYPTION = (
    "WALG_PGP_KEY", "WALG_PGP_KEY_PATH", "WALG_GPG_KEY_ID", "WALE_GPG_KEY_ID", "GPG_KEY_ID", "WALG_ENVELOPE_PGP_KEY",
    "WALG_ENVELOPE_PGP_KEY_PATH", "WALG_CSE_KMS_ID", "YC_CSE_KMS_KEY_ID",
)  # fmt: skip

EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 - Prometheus and the kubelet come from outside the pod

T = TypeVar("T")


class Secret(Generic[T]):
    """A string, or bytes, that never shows: `repr` and `str` are `***`; `reveal()` returns it."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def __repr__(self) -> str:
        return "***"

    def reveal(self) -> T:
        """Return the secret itself."""
        return self._value


def parse_size(name: str, text: str) -> int:
    """Read a size such as `256MiB`, `1GB` or `1073741823`; raise `ConfigError` naming the setting `name`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{name}={text!r} is not a size", hint="Write bytes, or a number with MiB or GiB.")
    return int(match[1]) * _UNITS[(match[2] or "").upper()]


class Environment:
    """Typed look-ups in a mapping of strings; an empty value counts as unset."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def text(self, *names: str) -> str | None:
        return next((v for name in names if (v := self._values.get(name, "").strip())), None)

    def untrimmed(self, name: str) -> str | None:
        return self._values.get(name) or None

    def integer(self, name: str, default: int, *, least: int = 1, most: int = 1 << 31) -> int:
        text = self.text(name)
        if text is None:
            return default
        if not is_number(text) or not least <= int(text) <= most:
            to_most = f" to {most}" if most < 1 << 31 else ""
            raise ConfigError(f"{name}={text!r} is not a whole number from {least}{to_most}", hint=f"Correct {name}.")
        return int(text)

    def rate(self, name: str) -> int | None:
        """Bytes a second; 0, as nothing at all, stands for no limit."""
        return self.size(name, 0) or None

    def seconds(self, name: str, default: float, *, least: float = 0.001) -> float:
        text = self.text(name)
        if text is None:
            return default
        try:
            value = float(text.removesuffix("s"))
        except ValueError:
            value = -1.0
        if not least <= value < 1e9:
            raise ConfigError(f"{name}={text!r} is not a number of seconds", hint=f"Correct {name}.")
        return value

    def size(self, name: str, default: int) -> int:
        text = self.text(name)
        return default if text is None else parse_size(name, text)

    def boolean(self, name: str, default: bool) -> bool:
        text = self.text(name)
        return default if text is None else parse_bool(name, text)

    def path(self, name: str) -> Path | None:
        text = self.text(name)
        return None if text is None else Path(text)

    def secret(self, *names: str) -> Secret[str] | None:
        text = self.text(*names)
        return None if text is None else Secret(text)

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        text = (self.text(name) or default).lower()
        if text not in allowed:
            raise ConfigError(f"{name}={text!r} is not supported", hint=f"Use one of {', '.join(allowed)}.")
        return text


def parse_schedule(name: str, default: str, values: Mapping[str, str], delay: timedelta) -> BackupSchedule | None:
    """Read a cron expression; an empty one means None, an absent one `default`. `delay` postpones every run."""
    cron = values.get(name, default).strip()  # empty is not unset: it means none
    if not cron:
        return None
    if (problem := cron_problem(cron)) is not None:
        raise ConfigError(
            f"{name}={cron!r} is no cron expression: {problem}",
            hint=f"Write for example '{default}', in UTC; leave it empty for none.",
        )
    return BackupSchedule(cron, delay)


def libsodium_key(env: Environment) -> Secret[bytes] | None:
    """Return the key that `WALG_LIBSODIUM_KEY` or its `_PATH` gives, or None; WAL-G's other ciphers are refused."""
    other = next((name for name in _OTHER_ENCRYPTION if env.text(name)), None)
    if other is not None:
        raise ConfigError(
            f"{other} is set, but this agent encrypts with libsodium only",
            hint="Unset it if nothing is encrypted with it, or begin a new repository with WALG_LIBSODIUM_KEY.",
        )
    transform = env.choice("WALG_LIBSODIUM_KEY_TRANSFORM", "none", ("none", "hex", "base64"))
    inline, path = env.untrimmed("WALG_LIBSODIUM_KEY"), env.path("WALG_LIBSODIUM_KEY_PATH")
    if inline is not None:
        return Secret(make_key("WALG_LIBSODIUM_KEY", os.fsencode(inline), transform))
    if path is None:
        return None
    return Secret(make_key(f"the file of WALG_LIBSODIUM_KEY_PATH={path}", _key_file(path), transform))


def _key_file(path: Path) -> bytes:
    try:
        return trim_key_file(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"WALG_LIBSODIUM_KEY_PATH={path} cannot be read: {error.strerror}",
            hint="Mount the key there, readable by the agent's user.",
        ) from error


def parse_listen_address(text: str) -> tuple[str, int]:
    """Read `HOST:PORT`; without a host it is every address."""
    host, colon, port = text.rpartition(":")
    if not colon or not is_number(port) or int(port) > 65535:
        raise ConfigError(f"PITR_HTTP_LISTEN={text!r} is not HOST:PORT", hint="Write for example 0.0.0.0:9108.")
    return host.strip("[]") or EVERY_ADDRESS, int(port)


def parse_tablespace_map(text: str | None) -> dict[str, str]:
    """Read `OLD=NEW,...`; nothing gives an empty map."""
    result: dict[str, str] = {}
    for pair in filter(None, (text or "").split(",")):
        old, equals, new = pair.strip().partition("=")
        if not (equals and old.startswith("/") and new.startswith("/")):
            raise ConfigError(
                f"PITR_TABLESPACE_MAP entry {pair!r} is not OLD=NEW", hint="Name two absolute directories."
            )
        result[old.rstrip("/")] = new.rstrip("/")
    return result


def parse_url(name: str, text: str) -> SplitResult:
    """Take a URL apart; raise `ConfigError` that names the setting `name`, and nothing of the URL, if that fails."""
    try:
        return urlsplit(text)
    except ValueError as error:
        raise ConfigError(f"{name} is no URL", hint=f"Correct {name}.") from error


def parse_pushgateway(text: str | None) -> str | None:
    """Read the URL of a Pushgateway, which may lack its scheme; None gives None."""
    if text is None:
        return None
    url = text if "://" in text else f"http://{text}"
    parts = parse_url("PITR_PUSHGATEWAY", url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ConfigError(
            "PITR_PUSHGATEWAY is no http or https URL without a user name",
            hint="Write for example http://pushgateway:9091.",
        )
    return url.rstrip("/")
