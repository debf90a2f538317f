"""What S3, botocore and the network call an error, in the agent's own terms.

Transient is what may pass without anyone changing a setting: throttling, server faults, the network, clocks and
expiring credentials. Everything else is permanent and names the setting to correct.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
from botocore import exceptions, parsers
from botocore.exceptions import BotoCoreError, ClientError

from agent.errors import RepositoryCorrupt, RepositoryError, RepositoryRefused, RepositoryUnavailable

S3_ERRORS: tuple[type[Exception], ...] = (
    ClientError, BotoCoreError, parsers.ResponseParserError, aiohttp.ClientError, OSError, UnicodeError
)  # fmt: skip
"""What a request to S3 may raise. `UnicodeError` is how the resolver refuses a host name."""

SET_UP_ERRORS: tuple[type[Exception], ...] = (*S3_ERRORS, ValueError)
"""What making the client may raise. `ValueError` is botocore's word on an endpoint that is no URL."""

ABOUT_CREDENTIALS = frozenset({
    "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch",
    "TokenRefreshRequired",
})  # fmt: skip
"""What S3 calls errors that other credentials may mend; none says that something is not allowed."""

EXISTS = frozenset({"PreconditionFailed", "412"})
"""What S3 calls the error of a conditional write to a key that exists."""

_TRANSIENT_ERRORS: tuple[type[Exception], ...] = (
    exceptions.HTTPClientError,
    exceptions.IncompleteReadError,
    exceptions.ResponseStreamingError,
    exceptions.CredentialRetrievalError,
    exceptions.MetadataRetrievalError,
    exceptions.TokenRetrievalError,
    exceptions.UnauthorizedSSOTokenError,
    exceptions.ConnectionError,
    exceptions.ChecksumError,
    exceptions.FlexibleChecksumError,
    parsers.ResponseParserError,
    aiohttp.ClientError,
    OSError,
)
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
_TRANSIENT_CODES = frozenset({
    "BadDigest", "BandwidthLimitExceeded", "ConditionalRequestConflict", "ExpiredToken", "ExpiredTokenException",
    "IncompleteBody", "InternalError", "OperationAborted", "PriorRequestNotComplete", "RequestExpired",
    "RequestLimitExceeded", "RequestThrottled", "RequestThrottledException", "RequestTimeout",
    "RequestTimeTooSkewed", "RequestTimeoutException", "ServiceUnavailable", "SlowDown", "Throttling",
    "ThrottlingException", "TokenRefreshRequired", "TooManyRequestsException", "XAmzContentChecksumMismatch",
})  # fmt: skip
_EXPIRED = "Credentials are renewed by whoever issues them; if this lasts, correct AWS_SESSION_TOKEN or the role."
_REGION = "Set AWS_REGION to the bucket's region, and AWS_ENDPOINT to an endpoint of that region."
_PERMISSIONS = "Allow these credentials s3:GetObject, PutObject, DeleteObject and ListBucket on bucket and prefix."
_ENCRYPTION = "Correct WALG_S3_SSE and WALG_S3_SSE_KMS_ID, or the key's policy."
_HINTS: Mapping[str, str] = {
    "AccessDenied": _PERMISSIONS,
    "AllAccessDisabled": _PERMISSIONS,
    "AccountProblem": _PERMISSIONS,
    "AuthorizationHeaderMalformed": _REGION,
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "IllegalLocationConstraintException": _REGION,
    "InvalidAccessKeyId": "The store does not know this access key; correct AWS_ACCESS_KEY_ID.",
    "InvalidBucketName": "Correct WALG_S3_PREFIX=s3://BUCKET/PATH.",
    "InvalidObjectState": "The object was moved to an archive tier; restore it there first.",
    "InvalidStorageClass": "Correct WALG_S3_STORAGE_CLASS.",
    "InvalidToken": "Correct AWS_SESSION_TOKEN.",
    "NoSuchBucket": "Create the bucket, or correct WALG_S3_PREFIX or AWS_ENDPOINT.",
    "NotImplemented": "The store lacks an operation that is needed; see AWS_ENDPOINT and WALG_S3_SSE.",
    "PermanentRedirect": _REGION,
    "RequestTimeTooSkewed": "Set the clock of this machine; S3 accepts 15 minutes of difference.",
    "SignatureDoesNotMatch": "Correct AWS_SECRET_ACCESS_KEY.",
    "TemporaryRedirect": _REGION,
}


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked, for messages: `action` with its object ("store object X"), and where."""

    action: str
    bucket: str
    endpoint: str


def error_code(error: ClientError) -> str:
    """Return S3's error code, or the status as text if the answer had no error document."""
    return str(error.response.get("Error", {}).get("Code", ""))


def translate(error: Exception, request: Request) -> RepositoryError:
    """Return our error for what a request raised: one of `S3_ERRORS`, or a subclass."""
    match error:
        case ClientError():
            about = error.response.get("ResponseMetadata", {})
            problem = refusal(error.response.get("Error", {}), about.get("HTTPStatusCode", 0), request)
            if error_code(error) == "RequestTimeTooSkewed":
                problem.message += _clocks(about.get("HTTPHeaders", {}).get("date", ""), datetime.now(UTC))
            return problem
        case aiohttp.ClientConnectorCertificateError() | ssl.SSLCertVerificationError():
            return RepositoryRefused(
                f"cannot {request.action}: the certificate of {request.endpoint} is not trusted ({_reason(error)})",
                hint="Set WALG_S3_CA_CERT_FILE to the CA that signed it, or correct AWS_ENDPOINT.",
            )
        case TimeoutError():
            message = f"cannot {request.action}: {request.endpoint} did not answer in time"
            return RepositoryUnavailable(message, hint="Check the network, or correct AWS_ENDPOINT.")
        case exceptions.NoCredentialsError() | exceptions.PartialCredentialsError():
            return RepositoryRefused(
                f"cannot {request.action}: no credentials were found",
                hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod a workload identity.",
            )
        case _ if isinstance(error, _TRANSIENT_ERRORS) and not isinstance(error, aiohttp.InvalidURL):
            message = f"cannot {request.action} at {request.endpoint}: {_reason(error)}"
            return RepositoryUnavailable(
                message, hint="Check that the endpoint answers, or correct AWS_ENDPOINT and AWS_S3_FORCE_PATH_STYLE."
            )
        case _:
            message = f"cannot {request.action} at {request.endpoint}: {_reason(error)}"
            return RepositoryRefused(message, hint="Correct AWS_ENDPOINT, AWS_REGION and WALG_S3_PREFIX.")


def refusal(answer: Mapping[str, Any], status: int, request: Request) -> RepositoryError:
    """Return our error for an error document of S3 (`Code`, `Message`) that came with an HTTP status (0: unknown)."""
    code = str(answer.get("Code") or status)
    hint = _ENCRYPTION if code.startswith("KMS.") else _HINTS.get(code, "")
    if code == "NoSuchBucket":
        return RepositoryRefused(f'cannot {request.action}: bucket "{request.bucket}" does not exist', hint=hint)
    message = f"cannot {request.action} at {request.endpoint}: the store answered {code}"
    if text := str(answer.get("Message") or "").strip(" ."):
        message += f" ({text})"
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS:
        return RepositoryUnavailable(message, hint=hint)
    if code in ("PreconditionFailed", "412"):
        return RepositoryCorrupt(f"cannot {request.action}: the object was replaced meanwhile", hint=hint)
    if status in (301, 307, 308):
        return RepositoryRefused(message, hint=_REGION)
    return RepositoryRefused(message, hint=hint or (_PERMISSIONS if status == 403 else ""))


def _clocks(store_date: str, now: datetime) -> str:
    """Tell how far this machine's clock is from the store's, as its `Date` header has it; "" if that is not known."""
    try:
        ahead = round((now - parsedate_to_datetime(store_date)).total_seconds())
    except (TypeError, ValueError):  # none, or without a zone
        return ""
    return f"; this machine's clock is {abs(ahead)} s {'ahead of' if ahead > 0 else 'behind'} the store's"


def _reason(error: Exception) -> str:
    """Return what the library says, in one line, or at least the kind of error."""
    return " ".join(str(error).split()) or type(error).__name__
