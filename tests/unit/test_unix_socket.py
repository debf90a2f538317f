"""The agent's unix socket: what is in its way."""

import socket
from pathlib import Path

import pytest

from agent.errors import ConfigError
from agent.server.unix_socket import bound_socket


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short path: a test's directory is too long for a socket."""
    monkeypatch.chdir(tmp_path)
    return Path("agent.sock")


def test_a_socket_that_a_killed_agent_left_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with bound_socket(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert not path.exists()


def test_a_file_that_has_the_name_of_the_socket_is_kept(path: Path) -> None:
    path.write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"PITR_SOCKET=agent\.sock exists and is no socket"), bound_socket(path):
        pass
    assert path.read_bytes() == b"precious"


def test_a_second_agent_is_refused_the_socket_of_the_first(path: Path) -> None:
    with bound_socket(path), pytest.raises(ConfigError, match="another agent serves"), bound_socket(path):
        pass


def test_a_path_that_is_too_long_for_a_socket_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is longer than 107 bytes"), bound_socket(tmp_path / ("s" * 120)):
        pass
