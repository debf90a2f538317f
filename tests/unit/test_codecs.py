"""The codecs write WAL-G's formats, read them back, and never pass off damaged bytes as good ones."""

import gzip
import lzma
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import lz4.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import RepositoryCorrupt
from agent.ports import Body
from agent.repository.codecs import PIECE_BYTES, WAL_EXTENSIONS, Codec, Decompressor, codec_for, codec_of
from agent.settings import Compression

BUCKETS = Path(__file__).parents[2] / "../shared/walg-buckets"
WRITTEN = [codec_for(method) for method in Compression]
FRAMED = [codec for codec in WRITTEN if codec.method != "none"]
CHECKSUMMED = [codec for codec in WRITTEN if codec.method in ("zstd", "lz4")]
GZ = Codec("gz", ".gz")

# Random bytes, and bytes as compressible as WAL.
contents = st.one_of(
    st.binary(max_size=3000),
    st.builds(lambda seed, times: seed * times, st.binary(min_size=1, max_size=30), st.integers(0, 300)),
)


def pack(codec: Codec, content: bytes) -> bytes:
    """Compress a whole object."""
    if codec == GZ:
        return gzip.compress(content)
    compressor = codec.compressor()
    return compressor.compress(content) + compressor.flush()


def unpack(codec: Codec, packed: Body) -> bytes:
    """Decompress a whole object."""
    decompressor = codec.decompressor()
    content = b"".join(decompressor.pieces(packed))
    decompressor.finish()
    return content


@given(st.sampled_from([*WRITTEN, GZ]), contents)
def test_what_is_compressed_decompresses_to_the_same_bytes(codec: Codec, content: bytes) -> None:
    assert unpack(codec, pack(codec, content)) == content


@pytest.mark.parametrize("step", [1000, 1 << 16, 1 << 30])
@pytest.mark.parametrize("codec", [*WRITTEN, GZ], ids=lambda codec: codec.method)
def test_content_of_many_pieces_comes_out_whole_in_pieces_of_a_few_mib_at_most(codec: Codec, step: int) -> None:
    content = os.urandom((3 << 20) + 1) + bytes((5 << 20) + 512) + os.urandom(5)
    packed = pack(codec, content)
    decompressor = codec.decompressor()
    pieces = [
        piece for start in range(0, len(packed), step) for piece in decompressor.pieces(packed[start : start + step])
    ]
    assert decompressor.finished
    assert b"".join(pieces) == content
    assert codec.method == "none" or max(map(len, pieces)) <= 4 * PIECE_BYTES


@given(st.sampled_from(FRAMED), contents, st.data())
def test_a_stream_cut_anywhere_is_refused(codec: Codec, content: bytes, data: st.DataObject) -> None:
    whole = pack(codec, content)
    kept = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(RepositoryCorrupt, match=r"ends too early|is damaged"):
        unpack(codec, whole[:kept])


@given(st.sampled_from([*CHECKSUMMED, GZ]), contents, st.data())
def test_a_flipped_bit_is_refused_or_changes_nothing(codec: Codec, content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(pack(codec, content))
    bit = data.draw(st.integers(0, len(damaged) * 8 - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    with suppress(RepositoryCorrupt):
        assert unpack(codec, damaged) == content


@given(st.sampled_from([*WRITTEN, GZ]), st.binary(max_size=300))
def test_bytes_from_anywhere_end_in_an_answer_or_in_a_refusal(codec: Codec, content: bytes) -> None:
    try:
        unpack(codec, content)
    except RepositoryCorrupt:
        assert codec.method != "none"


@pytest.mark.parametrize("codec", FRAMED, ids=lambda codec: codec.method)
def test_bytes_after_the_end_are_refused(codec: Codec) -> None:
    with pytest.raises(RepositoryCorrupt):
        unpack(codec, pack(codec, b"content") + b"\x01")


@pytest.mark.parametrize("codec", [GZ, codec_for(Compression.ZSTD)], ids=lambda codec: codec.method)
def test_concatenated_frames_are_one_object(codec: Codec) -> None:
    assert unpack(codec, pack(codec, b"one ") + pack(codec, b"") + pack(codec, b"two")) == b"one two"


def test_a_second_lz4_frame_is_refused_where_wal_g_would_drop_it() -> None:
    codec = codec_for(Compression.LZ4)
    with pytest.raises(RepositoryCorrupt, match="goes on after its end"):
        unpack(codec, pack(codec, b"one") * 2)


@pytest.mark.parametrize("codec", [*FRAMED, GZ], ids=lambda codec: codec.method)
def test_what_expands_to_far_more_comes_in_small_pieces(codec: Codec) -> None:
    bomb = pack(codec, bytes(20 << 20))
    assert max(map(len, codec.decompressor().pieces(bomb))) <= 2 * PIECE_BYTES


@given(st.sampled_from([*WRITTEN, GZ]), contents, st.integers(1, 500))
def test_a_stream_fed_in_pieces_is_finished_only_when_whole(codec: Codec, content: bytes, step: int) -> None:
    packed = pack(codec, content)
    decompressor = codec.decompressor("x")

    def fed() -> Iterator[bytes]:
        for start in range(0, len(packed), step):
            assert codec.method == "none" or not decompressor.finished
            yield from decompressor.pieces(packed[start : start + step])

    assert b"".join(fed()) == content
    assert decompressor.finished
    decompressor.finish()


@given(st.sampled_from(WRITTEN), st.lists(st.binary(max_size=500), max_size=10), st.booleans())
def test_what_is_compressed_in_pieces_is_their_concatenation(codec: Codec, pieces: list[bytes], apart: bool) -> None:
    compressor = codec.compressor(apart=apart)
    packed = b"".join([*(compressor.compress(memoryview(piece)) for piece in pieces), compressor.flush()])
    assert unpack(codec, packed) == b"".join(pieces)


def test_lz4_objects_have_wal_gs_header_but_for_smaller_blocks() -> None:
    assert pack(codec_for(Compression.LZ4), b"x" * 100)[:6] == bytes.fromhex("04224d186450")


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("method", ["lz4", "zstd"])
def test_a_checksum_is_left_out_where_a_digest_does_its_work(method: str, apart: bool) -> None:
    codec = codec_for(Compression(method))
    sizes = []
    for checksum in (True, False):
        compressor = codec.compressor(checksum=checksum, apart=apart)
        packed = compressor.compress(b"x" * 100) + compressor.flush()
        assert unpack(codec, packed) == b"x" * 100
        sizes.append(len(packed))
    assert sizes[0] - sizes[1] == 4


def test_zstd_objects_are_one_frame_with_a_checksum_and_without_content_size() -> None:
    packed = pack(codec_for(Compression.ZSTD), b"x" * 100)
    assert packed[:5] == bytes.fromhex("28b52ffd04")


@pytest.mark.parametrize("method", ["lz4", "zstd"])
def test_pieces_apart_are_frames_of_zstd_alone_for_wal_g_reads_one_of_lz4(method: str) -> None:
    codec = codec_for(Compression(method))
    compressor = codec.compressor(apart=True)
    packed = b"".join([*(compressor.compress(os.urandom(1000)) for _ in range(3)), compressor.flush()])
    assert packed.count(codec.magic) == (3 if method == "zstd" else 1)
    assert method == "lz4" or packed.count(codec.magic + b"\x04") == 3, "a checksum in each, and no content size"


def test_lzma_objects_have_wal_gs_header_and_an_end_marker() -> None:
    packed = pack(codec_for(Compression.LZMA), b"x" * 100)
    assert packed[:13] == bytes.fromhex("5d00008000" + "ff" * 8)
    assert lzma.decompress(packed, lzma.FORMAT_ALONE) == b"x" * 100


def test_a_dictionary_that_would_take_gigabytes_is_refused() -> None:
    packed = bytearray(pack(codec_for(Compression.LZMA), b"x" * 100))
    packed[1:5] = b"\xff\xff\xff\xff"
    with pytest.raises(RepositoryCorrupt, match="is damaged"):
        unpack(codec_for(Compression.LZMA), packed)


def test_lz4_frames_with_linked_blocks_are_read() -> None:
    content = bytes(range(256)) * 4000
    packed = lz4.frame.compress(content, block_linked=True, block_size=lz4.frame.BLOCKSIZE_MAX64KB, store_size=True)
    assert unpack(codec_for(Compression.LZ4), packed) == content


@pytest.mark.parametrize("extension", WAL_EXTENSIONS)
def test_the_last_extension_names_the_codec(extension: str) -> None:
    codec = codec_of(f"wal_005/000000010000000000000002{extension}")
    assert codec.extension == extension
    assert codec_of(f"a/part_001.tar{extension}") == codec_of(f"a/00000002.history{extension}") == codec
    assert isinstance(codec.decompressor(), Decompressor)


@pytest.mark.parametrize("name", ["wal_005/000000010000000000000002.lzo", "a.zst/part_001.tar.exe", "x.json"])
def test_an_unknown_extension_is_refused_by_name(name: str) -> None:
    with pytest.raises(RepositoryCorrupt, match=name):
        codec_of(name)


@pytest.mark.skipif(not BUCKETS.is_dir(), reason="no repositories written by WAL-G beside this checkout")
@pytest.mark.parametrize("repository", ["pg15-lz4-full", "pg17-zstd-delta", "pg15-lzma"])
def test_wal_written_by_wal_g_is_read(repository: str) -> None:
    key = min(path for path in (BUCKETS / repository / "bucket/wal_005").iterdir() if path.suffix != ".json")
    content = unpack(codec_of(key.name), key.read_bytes())
    assert len(content) in (1 << 20, 16 << 20)


LZ4 = codec_for(Compression.LZ4)


def unchecked(packed: bytes, step: int) -> bytes:
    """Decompress lz4 as for content that a digest proves."""
    decompressor = LZ4.decompressor(checksum=False)
    steps = (packed[start : start + step] for start in range(0, len(packed), step))
    content = b"".join(piece for stored in steps for piece in decompressor.pieces(stored))
    decompressor.finish()
    return content


@given(contents, st.sampled_from([4, 5, 6, 7]), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 40))
def test_any_lz4_frame_is_read_whose_content_a_digest_proves(
    content: bytes, block_size: int, linked: bool, checksum: bool, sized: bool, step: int
) -> None:
    packed = lz4.frame.compress(
        content, block_size=block_size, block_linked=linked, content_checksum=checksum, store_size=sized
    )
    assert unchecked(packed, step) == content


@given(contents, st.integers(1, 40), st.data())
def test_an_lz4_frame_cut_anywhere_is_refused_although_its_checksum_is_passed_over(
    content: bytes, step: int, data: st.DataObject
) -> None:
    whole = pack(LZ4, content)
    with pytest.raises(RepositoryCorrupt, match=r"ends too early|is damaged"):
        unchecked(whole[: data.draw(st.integers(0, len(whole) - 1))], step)


@given(contents, st.binary(min_size=1, max_size=20), st.integers(1, 40))
def test_bytes_after_an_lz4_frame_are_refused_although_its_checksum_is_passed_over(
    content: bytes, more: bytes, step: int
) -> None:
    with pytest.raises(RepositoryCorrupt, match="goes on after its end"):
        unchecked(pack(LZ4, content) + more, step)


@pytest.mark.parametrize("codec", [*WRITTEN, GZ], ids=lambda codec: codec.method)
def test_it_is_known_which_streams_carry_a_checksum_of_their_content(codec: Codec) -> None:
    assert codec.has_checksum(pack(codec, b"content")) == (codec in [*CHECKSUMMED, GZ])
    bare = {"zstd": b"\x28\xb5\x2f\xfd\x00", "lz4": lz4.frame.compress(b"content")}
    assert not codec.has_checksum(bare.get(codec.method, b"")) or codec == GZ
