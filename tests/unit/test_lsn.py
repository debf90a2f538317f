import pytest
from hypothesis import given
from hypothesis.strategies import integers

from agent.domain.lsn import format_lsn, parse_lsn


@given(integers(0, 2**64 - 1))
def test_an_lsn_survives_being_printed_and_read(lsn: int) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn


@pytest.mark.parametrize(("text", "lsn"), [("0/0", 0), ("16/B374D848", 0x16B374D848), ("ffffffff/FFFFFFFF", 2**64 - 1)])
def test_an_lsn_is_read_as_postgresql_reads_it(text: str, lsn: int) -> None:
    assert parse_lsn(text) == lsn


@pytest.mark.parametrize("text", ["", "/", "1", "1/", "/1", "1/2/3", " 1/2", "1/2\n", "123456789/0", "0x1/2", "1/G"])
def test_what_is_no_lsn_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an LSN"):
        parse_lsn(text)
