"""A stream becomes parts of one size, as many as S3 takes in an object."""

from collections.abc import AsyncIterator

import pytest

from agent.errors import RepositoryRefused
from agent.storage.s3_upload import PART_BYTES, gather_parts


async def chunks(*sizes: int) -> AsyncIterator[bytes]:
    for number, size in enumerate(sizes):
        yield bytes([number]) * size


async def test_only_the_last_part_is_shorter_and_nothing_is_lost_between_them() -> None:
    sizes = (PART_BYTES - 1, 3, PART_BYTES, 5)
    parts = [part async for part in gather_parts("tar", chunks(*sizes), most=3)]
    assert [part.number for part in parts] == [1, 2, 3]
    assert [len(part.body) for part in parts] == [PART_BYTES, PART_BYTES, 7]
    assert b"".join(part.body for part in parts) == b"".join([chunk async for chunk in chunks(*sizes)])


async def test_what_does_not_fit_into_an_object_is_refused_before_its_last_part_is_sent() -> None:
    parts = gather_parts("tar", chunks(PART_BYTES, PART_BYTES, 1), most=2)
    assert (await anext(parts)).number == 1
    with pytest.raises(RepositoryRefused, match="tar would be larger than 0 GiB, which S3 does not take"):
        await anext(parts)
