"""The key of libsodium encryption, as WAL-G makes it of what is configured."""

import base64
import binascii

from agent.errors import ConfigError

KEY_BYTES = 32
_LEAST_BYTES = 25  # of a key that is taken as it is
# What Go's strings.TrimSpace removes; Python's own strip removes other characters, too.
_GO_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


def trim_key_file(content: bytes) -> bytes:
    """Return the content of a key file without white space around it, which WAL-G does not take for a part of it."""
    return content.decode("utf-8", "surrogateescape").strip(_GO_SPACE).encode("utf-8", "surrogateescape")


def make_key(name: str, text: bytes, transform: str) -> bytes:
    """Return the 32 bytes that `text` stands for.

    Args:
        name: Where it comes from, for messages, which never show the text.
        text: What is configured.
        transform: `none`: at least 25 bytes, cut or filled with zeros to 32; `hex` or `base64`: of exactly 32.

    Raises:
        ConfigError: It is too short, or not what `transform` says.

    Source: WAL-G, internal/crypto/libsodium/keytransform.go.
    """
    if transform == "none":
        if len(text) < _LEAST_BYTES:
            raise ConfigError(
                f"{name} has {len(text)} bytes, fewer than {_LEAST_BYTES}",
                hint="Use a key of 32 bytes; for one in hex or base64 set WALG_LIBSODIUM_KEY_TRANSFORM.",
            )
        return text[:KEY_BYTES].ljust(KEY_BYTES, b"\0")
    key = _decoded(text, transform)
    if key is None or len(key) != KEY_BYTES:
        found = f"is not {transform}" if key is None else f"is {len(key)} bytes in {transform}, not {KEY_BYTES}"
        raise ConfigError(f"{name} {found}", hint="Correct the key, or WALG_LIBSODIUM_KEY_TRANSFORM.")
    return key


def _decoded(text: bytes, transform: str) -> bytes | None:
    try:
        if transform == "hex":
            return binascii.unhexlify(text)
        return base64.b64decode(text.translate(None, b"\r\n"), validate=True)  # as Go's: line ends are passed over
    except ValueError:  # not raised further: what is configured is a secret
        return None
