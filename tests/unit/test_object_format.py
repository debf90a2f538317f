"""An object is packed by codec and cipher together; settings that do not fit the object are told from damage."""

import os
from collections.abc import Callable

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from agent.environment import Secret
from agent.errors import RepositoryCorrupt, WrongKey
from agent.repository.object_format import ObjectFormat
from agent.settings import Compression
from tests.support.object_formats import KEY, OTHER_KEY, unpack

NAME = "wal_005/000000010000000000000002"
CONTENT = os.urandom(3000) + bytes(40_000) + os.urandom(20_000)
contents = st.one_of(
    st.binary(max_size=3000),
    st.builds(lambda seed, times: seed * times, st.binary(min_size=1, max_size=30), st.integers(0, 3000)),
)
keys = st.sampled_from([None, KEY])


@given(st.sampled_from(Compression), keys, contents, st.integers(1, 1 << 20))
def test_what_is_packed_unpacks_to_the_same_bytes(
    compression: Compression, key: Secret[bytes] | None, content: bytes, step: int
) -> None:
    objects = ObjectFormat(compression, key)
    assert unpack(objects, NAME + objects.extension, objects.encode(content), step=max(step, 50)) == content


@given(st.sampled_from(Compression), keys, st.lists(contents, max_size=5))
def test_what_is_packed_in_pieces_is_their_concatenation(
    compression: Compression, key: Secret[bytes] | None, pieces: list[bytes]
) -> None:
    objects = ObjectFormat(compression, key)
    encoder = objects.encoder()
    packed = b"".join([*(encoder.encode(memoryview(piece)) for piece in pieces), encoder.flush()])
    assert unpack(objects, NAME + objects.extension, packed) == b"".join(pieces)


@pytest.mark.parametrize("written", Compression)
def test_objects_of_every_method_are_read_whatever_is_written(written: Compression) -> None:
    objects, reader = ObjectFormat(written, KEY), ObjectFormat(Compression.ZSTD, KEY)
    assert unpack(reader, NAME + objects.extension, objects.encode(CONTENT)) == CONTENT


@pytest.mark.parametrize("compression", Compression)
def test_nothing_of_the_content_is_in_an_encrypted_object(compression: Compression) -> None:
    canary = b"canary row of a table"
    packed = ObjectFormat(compression, KEY).encode(canary + bytes(100_000))
    assert canary not in packed
    assert ObjectFormat(compression, KEY).encode(canary) != ObjectFormat(compression, KEY).encode(canary)


@pytest.mark.parametrize("compression", Compression)
def test_an_encrypted_object_that_is_cut_short_is_refused(compression: Compression) -> None:
    objects = ObjectFormat(compression, KEY)
    packed = objects.encode(CONTENT)
    for kept in (0, 10, 24, 41, 24 + 8209, len(packed) - 17, len(packed) - 1):
        with pytest.raises(RepositoryCorrupt, match=NAME):
            unpack(objects, NAME + objects.extension, packed[:kept])


def test_a_small_object_that_expands_to_much_comes_out_in_small_pieces() -> None:
    objects, sizes = ObjectFormat(Compression.ZSTD, KEY), list[int]()
    packed = objects.encode(bytes(64 << 20))
    assert len(packed) < 8192, "all of it is in the last chunk"
    decoder = objects.decoder(NAME + ".zst", lambda piece: sizes.append(len(piece)))
    decoder.take(packed)
    decoder.finish()
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= 2 << 20


def told(objects: ObjectFormat, packed: bytes, extension: str) -> str:
    """Return what is said of an object that does not fit the settings."""
    with pytest.raises(WrongKey) as caught:
        unpack(objects, NAME + extension, packed)
    assert NAME in caught.value.message
    assert "WALG_LIBSODIUM_KEY" in caught.value.one_line()
    return caught.value.one_line()


@pytest.mark.parametrize("compression", Compression)
def test_another_key_is_told(compression: Compression) -> None:
    packed = ObjectFormat(compression, KEY).encode(CONTENT)
    other = ObjectFormat(compression, OTHER_KEY)
    assert "was not encrypted with this key" in told(other, packed, other.extension)


@pytest.mark.parametrize("compression", Compression)
def test_an_object_that_is_not_encrypted_is_told_where_a_key_is_set(compression: Compression) -> None:
    plain, encrypted = ObjectFormat(compression, None), ObjectFormat(compression, KEY)
    known = compression in (Compression.ZSTD, Compression.LZ4, Compression.LZMA)
    expected = "is not encrypted, but" if known else "was not encrypted with this key"
    assert expected in told(encrypted, plain.encode(CONTENT), plain.extension)


@pytest.mark.parametrize("compression", [method for method in Compression if method is not Compression.NONE])
def test_an_encrypted_object_is_told_where_no_key_is_set(compression: Compression) -> None:
    plain, encrypted = ObjectFormat(compression, None), ObjectFormat(compression, KEY)
    assert "it is encrypted, but no key is set" in told(plain, encrypted.encode(CONTENT), plain.extension)


@pytest.mark.parametrize("compression", [Compression.ZSTD, Compression.LZ4])
def test_damage_behind_the_beginning_is_not_taken_for_another_key(compression: Compression) -> None:
    for key in (None, KEY):
        objects = ObjectFormat(compression, key)
        damaged = bytearray(objects.encode(os.urandom(50_000)))
        damaged[30_000] ^= 1
        with pytest.raises(RepositoryCorrupt, match="is damaged") as caught:
            unpack(objects, NAME + objects.extension, damaged)
        assert not isinstance(caught.value, WrongKey)


def test_an_error_of_whoever_takes_the_bytes_passes_as_it_is() -> None:
    class Full(RepositoryCorrupt):
        pass

    def refuse(_piece: bytes) -> None:
        raise Full("that is too much")

    objects = ObjectFormat(Compression.BROTLI, None)
    packed = objects.encode(CONTENT)
    take: Callable[[bytes], None] = objects.decoder(NAME + ".br", refuse).take
    with pytest.raises(Full):
        take(packed)


def test_the_digest_of_an_encrypted_object_confirms_no_guess_without_the_key() -> None:
    def digest(key: Secret[bytes] | None) -> str:
        return ObjectFormat(Compression.LZ4, key).hasher().update(CONTENT).hexdigest()

    assert digest(None) == blake3(CONTENT).hexdigest(), "as any tool computes it"
    assert digest(KEY) == digest(KEY)
    assert len({digest(None), digest(KEY), digest(OTHER_KEY), blake3(CONTENT, key=KEY.reveal()).hexdigest()}) == 4
