"""What is configured as libsodium key means what it means to WAL-G, and never shows."""

import base64
from pathlib import Path

import pytest

from agent.domain.encryption_key import make_key, trim_key_file
from agent.errors import ConfigError
from agent.settings import load_settings

BASE = {"WALG_FILE_PREFIX": "/backups"}
RAW = bytes(range(200, 232))
HEX, BASE64 = RAW.hex(), base64.b64encode(RAW).decode()
INLINE, PATH, TRANSFORM = "WALG_LIBSODIUM_KEY", "WALG_LIBSODIUM_KEY_PATH", "WALG_LIBSODIUM_KEY_TRANSFORM"
NONE = {TRANSFORM: "none"}


def key_of(settings: dict[str, str]) -> bytes | None:
    key = load_settings(BASE | settings).libsodium_key
    return None if key is None else key.reveal()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({}, None),
        ({INLINE: "", PATH: ""}, None),
        ({TRANSFORM: "hex"}, None),
        ({INLINE: "k" * 25}, b"k" * 25 + bytes(7)),
        ({INLINE: "k" * 31, **NONE}, b"k" * 31 + b"\0"),
        ({INLINE: "k" * 32, **NONE}, b"k" * 32),
        ({INLINE: "k" * 32 + "more"}, b"k" * 32),
        ({INLINE: "é" * 13}, "é".encode() * 13 + bytes(6)),
        ({INLINE: " " + "k" * 25 + "\n"}, b" " + b"k" * 25 + b"\n" + bytes(5)),
        ({INLINE: HEX, TRANSFORM: "hex"}, RAW),
        ({INLINE: HEX.upper(), TRANSFORM: "hex"}, RAW),
        ({INLINE: BASE64, TRANSFORM: "base64"}, RAW),
        ({INLINE: BASE64[:20] + "\r\n" + BASE64[20:], TRANSFORM: "base64"}, RAW),
        ({INLINE: HEX}, HEX[:32].encode()),
    ],
)
def test_a_key_in_the_environment_is_taken_as_the_transform_says(settings: dict[str, str], key: bytes | None) -> None:
    assert key_of(settings) == key


@pytest.mark.parametrize(
    ("content", "transform", "key"),
    [
        (b"\t\n " + b"k" * 25 + b"\r\n", "none", b"k" * 25 + bytes(7)),
        ("\u00a0\u2003".encode() + b"k" * 32 + "\u3000\n".encode(), "none", b"k" * 32),
        (b"\x1c" + b"k" * 31, "none", b"\x1c" + b"k" * 31),
        (b"\x85" + b"k" * 31, "none", b"\x85" + b"k" * 31),
        (RAW, "none", RAW),
        (HEX.encode() + b"\n", "hex", RAW),
        (b" " + BASE64.encode() + b"\n\n", "base64", RAW),
    ],
)
def test_a_key_in_a_file_is_taken_without_white_space_around_it(
    content: bytes, transform: str, key: bytes, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(content)
    assert key_of({PATH: str(tmp_path / "key"), TRANSFORM: transform}) == key


def test_the_key_in_the_environment_comes_before_the_file() -> None:
    assert key_of({INLINE: "k" * 32, PATH: "/no/such/file"}) == b"k" * 32


@pytest.mark.parametrize(
    ("text", "transform", "told"),
    [
        ("c4n4ry-s3cr3t-of-24-bytes"[:24], "none", "24 bytes, fewer than 25"),
        ("c4n4ry" * 8, "hex", "is not hex"),
        (f"{HEX} ", "hex", "is not hex"),
        (HEX[:-1], "hex", "is not hex"),
        (HEX[:-2], "hex", "is 31 bytes in hex, not 32"),
        (HEX + "00", "hex", "is 33 bytes in hex, not 32"),
        (f" {BASE64}", "base64", "is not base64"),
        (BASE64.rstrip("="), "base64", "is not base64"),
        (BASE64[:40], "base64", "is 30 bytes in base64, not 32"),
        (base64.urlsafe_b64encode(b"\xff" * 32).decode(), "base64", "is not base64"),
    ],
)
def test_a_key_that_is_none_is_told_without_showing_it(text: str, transform: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        key_of({INLINE: text, TRANSFORM: transform})
    line = caught.value.one_line()
    assert line.startswith(f"{INLINE} ")
    assert told in line
    assert TRANSFORM in line
    error: BaseException | None = caught.value
    while error is not None:
        assert text.strip() not in str(error)
        error = error.__cause__ or error.__context__


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    cannot_be_read = (Path("/no/such/file"), tmp_path)
    for path in (*cannot_be_read, tmp_path / "empty"):
        told = "cannot be read" if path in cannot_be_read else "has 0 bytes"
        with pytest.raises(ConfigError, match=f"{PATH}={path} {told}"):
            key_of({PATH: str(path)})


def test_an_unknown_transform_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"{TRANSFORM}='rot13'"):
        key_of({INLINE: "k" * 32, TRANSFORM: "rot13"})


def test_the_key_does_not_show_in_the_settings() -> None:
    settings = load_settings(BASE | {INLINE: "c4n4ry" * 6})
    assert "c4n4ry" not in repr(settings)
    assert "c4n4ry" not in str(settings.libsodium_key)


@pytest.mark.parametrize("other", ["WALG_PGP_KEY", "WALG_PGP_KEY_PATH", "WALG_CSE_KMS_ID", "YC_CSE_KMS_KEY_ID"])
def test_another_way_of_encrypting_is_refused_instead_of_storing_plain(other: str) -> None:
    with pytest.raises(ConfigError, match=f"{other} is set") as caught:
        load_settings(BASE | {other: "c4n4ry", INLINE: "k" * 32})
    assert "c4n4ry" not in caught.value.one_line()


def test_white_space_is_what_go_takes_for_it() -> None:
    assert trim_key_file(b"\x0b\x0c\xc2\x85 key\xe2\x80\xa8\xe1\x9a\x80") == b"key"
    assert trim_key_file(b"\x1f\xef\xbb\xbfkey\x00") == b"\x1f\xef\xbb\xbfkey\x00"
    assert make_key("the key", b"k" * 40, "none") == b"k" * 32
