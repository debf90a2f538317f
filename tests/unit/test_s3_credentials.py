"""When the credentials that requests are signed with expire."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent.storage.s3_credentials import FoundCredentials


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the search end with the environment."""
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


async def test_keys_do_not_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_CREDENTIAL_EXPIRATION", raising=False)
    credentials = FoundCredentials()
    assert credentials.expire_at is None
    assert await credentials.load_credentials() is credentials
    assert credentials.expire_at is None


async def test_a_session_expires_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    expiry = (datetime.now(UTC) + timedelta(hours=1)).replace(microsecond=0)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", expiry.isoformat())
    credentials = FoundCredentials()
    await credentials.load_credentials()
    assert credentials.expire_at == expiry
