"""Every error of botocore and aiohttp has a meaning here; the answers themselves are tested against a real server."""

import inspect
import socket
import ssl
from typing import Any

import aiohttp
import botocore.exceptions
import pytest
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from agent.errors import RepositoryRefused, RepositoryUnavailable
from agent.storage.s3_errors import S3_ERRORS, Request, translate

REQUEST = Request("read prefix/key", "bucket", "https://s3.example")


def error_classes(module: object) -> list[type[Exception]]:
    return [
        found
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, Exception) and not issubclass(found, Warning) and issubclass(found, S3_ERRORS)
    ]


def made(kind: type[Exception]) -> Exception:
    """Make an error as it arrives, but for the arguments that most classes want and that do not matter here."""
    bare = type(
        kind.__name__, (kind,), {"__init__": lambda self: None, "__str__": lambda self: "what the library says"}
    )
    error: Exception = bare()
    if isinstance(error, ClientError):
        error.response = {"Error": {"Code": "SomethingNew"}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    return error


# Errors that a later attempt, without anyone changing a setting, may not meet again.
PASSING = {
    "ChecksumError", "ConnectTimeoutError", "ConnectionClosedError", "ConnectionError", "CredentialRetrievalError",
    "EndpointConnectionError", "FlexibleChecksumError", "HTTPClientError", "IncompleteReadError",
    "MetadataRetrievalError", "ProxyConnectionError", "ReadTimeoutError", "ResponseStreamingError", "SSLError",
    "TokenRetrievalError", "UnauthorizedSSOTokenError",
}  # fmt: skip


@pytest.mark.parametrize("kind", error_classes(botocore.exceptions), ids=lambda kind: kind.__name__)
def test_every_error_of_botocore_is_translated(kind: type[Exception]) -> None:
    expected = RepositoryUnavailable if kind.__name__ in PASSING else RepositoryRefused
    translated = translate(made(kind), REQUEST)
    assert type(translated) is expected
    assert "prefix/key" in translated.message


def test_no_error_of_botocore_escapes() -> None:
    strange = {
        name
        for name, found in inspect.getmembers(botocore.exceptions, inspect.isclass)
        if issubclass(found, Exception) and not issubclass(found, (*S3_ERRORS, Warning))
    }
    assert strange == {"UndefinedModelAttributeError", "MissingServiceIdError"}  # a broken installation


@pytest.mark.parametrize("kind", error_classes(aiohttp), ids=lambda kind: kind.__name__)
def test_every_error_of_aiohttp_is_transient_but_a_certificate_and_a_url(kind: type[Exception]) -> None:
    lasting = issubclass(kind, (aiohttp.ClientConnectorCertificateError, aiohttp.InvalidURL))
    assert type(translate(made(kind), REQUEST)) is (RepositoryRefused if lasting else RepositoryUnavailable)


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError("reset"), BrokenPipeError(), socket.gaierror(-2, "unknown host"), TimeoutError(),
     ssl.SSLError(1, "wrong version number"), ResponseParserError("no XML")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_errors_of_the_network_are_transient(error: Exception) -> None:
    translated = translate(error, REQUEST)
    assert isinstance(translated, RepositoryUnavailable)
    assert "https://s3.example" in translated.message
    assert "\n" not in translated.one_line()


def test_an_untrusted_certificate_names_the_setting() -> None:
    translated = translate(ssl.SSLCertVerificationError(1, "self-signed certificate"), REQUEST)
    assert isinstance(translated, RepositoryRefused)
    assert "WALG_S3_CA_CERT_FILE" in translated.hint


@pytest.mark.parametrize(
    ("code", "status", "setting"),
    [
        ("NoSuchBucket", 404, "WALG_S3_PREFIX"),
        ("InvalidAccessKeyId", 403, "AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, "AWS_SECRET_ACCESS_KEY"),
        ("AccessDenied", 403, "PutObject"),
        ("403", 403, "PutObject"),
        ("ExpiredToken", 400, "AWS_SESSION_TOKEN"),
        ("RequestTimeTooSkewed", 403, "clock"),
        ("PermanentRedirect", 301, "AWS_REGION"),
        ("301", 301, "AWS_REGION"),
        ("AuthorizationHeaderMalformed", 400, "AWS_REGION"),
        ("InvalidStorageClass", 400, "WALG_S3_STORAGE_CLASS"),
        ("KMS.NotFoundException", 400, "WALG_S3_SSE_KMS_ID"),
    ],
)
def test_a_hint_names_what_to_correct(code: str, status: int, setting: str) -> None:
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert setting in translate(ClientError(response, "GetObject"), REQUEST).hint
