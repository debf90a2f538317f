"""What a store checks before it obeys: keys, which expire and are rotated, and the time of day. For a FaultProxy."""

import re
import secrets
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import parse_qs

from aiohttp import web
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from agent.lab.seaweedfs import SeaweedServer
from tests.support.fault_proxy import Message, refusal

_ACCEPTED_SKEW = timedelta(minutes=15)
_SIGNED = r"(?im)^(content-md5|if-none-match|if-match|range|x-amz-[\w-]+):"


class KeyRing:
    """Issues access keys, and lets only requests with one that is valid pass: signed anew with the server's own key.

    Which key it is, is looked at; the signature by it is not.
    """

    def __init__(self, server: SeaweedServer) -> None:
        self._own = Credentials(server.access_key, server.secret_key)
        self._valid: dict[str, str | None] = {}
        self._expired: set[str] = set()

    def issue(self, *, temporary: bool = False) -> Credentials:
        """Return a new key, with a session token if it is `temporary`."""
        number = secrets.token_hex(4)
        issued = Credentials(f"KEY{number}", f"secret{number}", f"token{number}" if temporary else None)
        self._valid[issued.access_key] = issued.token
        return issued

    def revoke_all(self) -> None:
        """Let no key that was issued until now pass any more: temporary ones are expired, others unknown."""
        self._expired.update(name for name, token in self._valid.items() if token is not None)
        self._valid.clear()

    def __call__(self, request: Message) -> Message | None:
        """Refuse the request, or make it the server's own. A guard."""
        found = re.search(r"Credential=(\w+)/", request.header("Authorization") or "")
        name = found[1] if found else ""
        if name in self._expired:
            return refusal(request, 400, "ExpiredToken")
        if name not in self._valid:
            return refusal(request, 403, "InvalidAccessKeyId")
        if self._valid[name] != request.header("X-Amz-Security-Token"):
            return refusal(request, 400, "InvalidToken")
        self._sign(request)
        return None

    def _sign(self, request: Message) -> None:
        request.drop_header("X-Amz-Security-Token")
        method, target, _ = request.first_line.split(" ")
        headers = {name: request.header(name) for name in re.findall(_SIGNED, request.head.decode())}
        signed = AWSRequest(method, f"http://{request.header('Host')}{target}", headers=headers, data=request.body)
        S3SigV4Auth(self._own, "s3", "us-east-1").add_auth(signed)
        for name, value in signed.headers.items():
            request.set_header(name, value)


class StoreClock:
    """The store's clock, `ahead` of the true time; requests signed by one that differs too much are refused."""

    def __init__(self) -> None:
        self.ahead = timedelta(0)

    def __call__(self, request: Message) -> Message | None:
        """Compare the request's time with the store's. A guard."""
        now = datetime.now(UTC) + self.ahead
        signed_at = datetime.strptime(request.header("X-Amz-Date") or "", "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if abs(now - signed_at) <= _ACCEPTED_SKEW:
            return None
        answer = refusal(request, 403, "RequestTimeTooSkewed")
        answer.set_header("Date", format_datetime(now, usegmt=True))
        return answer


class TokenService:
    """An STS endpoint: gives temporary keys of `keys` to whoever shows the web identity token that is current.

    token_file: where that token is, as Kubernetes projects it into a pod.
    """

    def __init__(self, keys: KeyRing, token_file: Path) -> None:
        self.token_file = token_file
        self.url = ""
        self._keys = keys
        self._runner: web.AppRunner | None = None
        self.rotate()

    @property
    def environment(self) -> dict[str, str]:
        """What EKS gives to a pod with a role, and where the service is."""
        return {
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/backup",
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(self.token_file),
            "AWS_ENDPOINT_URL_STS": self.url,
        }

    def rotate(self) -> None:
        """Project another token; the one before is not current any more."""
        self._token = secrets.token_hex(8)
        self.token_file.write_text(self._token)

    async def __aenter__(self) -> "TokenService":
        application = web.Application()
        application.router.add_post("/", self._assume_role)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _assume_role(self, request: web.Request) -> web.Response:
        asked = parse_qs(await request.text())
        assert asked["Action"] == ["AssumeRoleWithWebIdentity"]
        if asked["WebIdentityToken"] != [self._token]:
            error = "<Error><Code>InvalidIdentityToken</Code><Message>it is not current</Message></Error>"
            return web.Response(status=400, text=f"<ErrorResponse>{error}</ErrorResponse>", content_type="text/xml")
        key = self._keys.issue(temporary=True)
        expiration = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        return web.Response(
            content_type="text/xml",
            text=f"""<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{key.access_key}</AccessKeyId>
<SecretAccessKey>{key.secret_key}</SecretAccessKey><SessionToken>{key.token}</SessionToken>
<Expiration>{expiration}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>""",
        )
