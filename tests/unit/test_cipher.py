"""Encryption is WAL-G's, byte for byte, and no altered, cut, mixed or foreign object passes for a whole one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.bindings import crypto_secretstream_xchacha20poly1305_init_push as init_push
from nacl.bindings import crypto_secretstream_xchacha20poly1305_push as push
from nacl.bindings import crypto_secretstream_xchacha20poly1305_state as SecretStream  # noqa: N812 - it is a class
from nacl.bindings import crypto_secretstream_xchacha20poly1305_TAG_FINAL as TAG_FINAL

from agent.errors import RepositoryCorrupt, WrongKey
from agent.repository.cipher import CHUNK_BYTES, SEALED_BYTES, Decryptor, Encryptor

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
SOURCE = "wal_005/X"
HEADER_BYTES, SEAL_BYTES = 24, 17
sizes = st.one_of(
    st.integers(0, 100),
    st.builds(lambda chunks, off: max(0, chunks * CHUNK_BYTES + off), st.integers(0, 5), st.integers(-2, 2)),
)


def content_of(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def encrypt(*pieces: bytes) -> bytes:
    encryptor = Encryptor(KEY)
    return b"".join([*map(encryptor.encrypt, pieces), encryptor.flush()])


def decrypt(sealed: bytes, key: bytes = KEY, step: int = 1 << 30) -> bytes:
    decryptor = Decryptor(key, SOURCE)
    pieces = [decryptor.decrypt(sealed[start : start + step]) for start in range(0, len(sealed), step)]
    return b"".join([*pieces, decryptor.finish()])


@given(st.lists(sizes, max_size=4), st.integers(1, 3 * SEALED_BYTES))
def test_what_is_encrypted_in_any_pieces_decrypts_from_any_pieces(lengths: list[int], step: int) -> None:
    pieces = [content_of(length) for length in lengths]
    assert decrypt(encrypt(*pieces), step=step) == b"".join(pieces)


@given(sizes)
def test_an_object_has_full_chunks_and_a_shorter_last_one(size: int) -> None:
    sealed = encrypt(content_of(size))
    assert len(sealed) == HEADER_BYTES + size + (size // CHUNK_BYTES + 1) * SEAL_BYTES
    assert (len(sealed) - HEADER_BYTES) % SEALED_BYTES >= SEAL_BYTES


def test_the_same_content_is_never_encrypted_to_the_same_bytes() -> None:
    assert encrypt(b"content") != encrypt(b"content")


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_an_object_cut_around_any_boundary_is_refused(size: int) -> None:
    sealed = encrypt(content_of(size))
    boundaries = [0, HEADER_BYTES, *range(HEADER_BYTES, len(sealed), SEALED_BYTES), len(sealed)]
    cuts = {cut for boundary in boundaries for cut in range(boundary - 18, boundary + 19) if 0 <= cut < len(sealed)}
    for cut in cuts:
        with pytest.raises(RepositoryCorrupt, match=SOURCE):
            decrypt(sealed[:cut])


def test_an_object_cut_at_the_end_of_a_chunk_is_cut_short_and_not_of_another_key() -> None:
    sealed = encrypt(content_of(2 * CHUNK_BYTES))
    for chunks in (1, 2):
        with pytest.raises(RepositoryCorrupt, match="ends too early") as caught:
            decrypt(sealed[: HEADER_BYTES + chunks * SEALED_BYTES])
        assert not isinstance(caught.value, WrongKey)


def test_every_flipped_bit_of_a_short_object_is_noticed() -> None:
    sealed = encrypt(b"content")
    for bit in range(len(sealed) * 8):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RepositoryCorrupt):
            decrypt(bytes(damaged))


@given(st.data())
def test_a_flipped_bit_is_damage_unless_it_is_in_the_first_chunk(data: st.DataObject) -> None:
    damaged = bytearray(encrypt(content_of(3 * CHUNK_BYTES + 5)))
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.sampled_from([1 << bit for bit in range(8)]))
    with pytest.raises(RepositoryCorrupt) as caught:
        decrypt(bytes(damaged))
    assert isinstance(caught.value, WrongKey) == (at < HEADER_BYTES + SEALED_BYTES)


def test_chunks_cannot_be_left_out_repeated_or_exchanged() -> None:
    sealed = encrypt(content_of(3 * CHUNK_BYTES))
    header, rest = sealed[:HEADER_BYTES], sealed[HEADER_BYTES:]
    one, two, three, last = (rest[start : start + SEALED_BYTES] for start in range(0, len(rest), SEALED_BYTES))
    for order in ([one, three, last], [one, one, two, three, last], [one, three, two, last], [two, one, three, last]):
        with pytest.raises(RepositoryCorrupt):
            decrypt(header + b"".join(order))


@pytest.mark.parametrize("extra", [b"x", bytes(SEAL_BYTES), bytes(SEALED_BYTES), bytes(3 * SEALED_BYTES)])
def test_bytes_after_the_end_are_refused(extra: bytes) -> None:
    with pytest.raises(RepositoryCorrupt):
        decrypt(encrypt(content_of(CHUNK_BYTES + 5)) + extra)


@pytest.mark.parametrize("size", [0, 5, CHUNK_BYTES, 4 * CHUNK_BYTES])
def test_another_key_is_told_with_the_object_and_the_settings(size: int) -> None:
    with pytest.raises(WrongKey) as caught:
        decrypt(encrypt(content_of(size)), OTHER_KEY)
    assert f"{SOURCE} was not encrypted with this key" in caught.value.message
    assert "WALG_LIBSODIUM_KEY_TRANSFORM" in caught.value.hint


def test_a_full_chunk_that_claims_to_be_the_last_is_refused_as_by_wal_g() -> None:
    stream = SecretStream()
    sealed = init_push(stream, KEY) + push(stream, content_of(CHUNK_BYTES), None, TAG_FINAL)
    for rest in (b"", push(stream, b"", None, TAG_FINAL)):
        with pytest.raises(RepositoryCorrupt, match="ends where it should not"):
            decrypt(sealed + rest)


@given(st.binary(max_size=2 * SEALED_BYTES))
def test_bytes_from_anywhere_are_refused(noise: bytes) -> None:
    with pytest.raises(RepositoryCorrupt):
        decrypt(noise)
