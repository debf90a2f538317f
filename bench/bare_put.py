"""PUTs bytes with nothing around it: the floor of a lone archive call."""

import http.client
import ssl
import time
from pathlib import Path
from urllib.parse import urlsplit

from botocore.config import Config
from botocore.session import Session

_FOLDER = "wal_005/"


class BarePut:
    """One kept connection; requests are signed beforehand, and their bodies are not."""

    def __init__(self, endpoint: str, credentials: tuple[str, str], bucket: str, prefix: str, ca: Path | None) -> None:
        """Measure below `prefix` of `bucket`; `ca`: the certificate to trust."""
        self._client = Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=endpoint,
            verify=str(ca) if ca else None,
            aws_access_key_id=credentials[0],
            aws_secret_access_key=credentials[1],
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )
        host = urlsplit(endpoint)
        self._connection = (
            http.client.HTTPSConnection(host.netloc, context=ssl.create_default_context(cafile=ca))
            if ca
            else http.client.HTTPConnection(host.netloc)
        )
        self._bucket, self._prefix = bucket, prefix
        self._puts = 0

    def stored(self, name: str) -> bytes:
        """Return the bytes that are stored for the WAL file `name`."""
        (found,) = self._client.list_objects_v2(Bucket=self._bucket, Prefix=f"{self._prefix}/{_FOLDER}{name}")[
            "Contents"
        ]
        return bytes(self._client.get_object(Bucket=self._bucket, Key=found["Key"])["Body"].read())

    def seconds(self, body: bytes) -> float:
        """Return how long the PUT of `body` takes."""
        self._puts += 1
        again = {"Bucket": self._bucket, "Key": f"{self._prefix}/again/{self._puts}"}
        url = urlsplit(self._client.generate_presigned_url("put_object", Params=again))
        started = time.perf_counter()
        self._connection.request("PUT", f"{url.path}?{url.query}", body=body)
        answer = self._connection.getresponse()
        answer.read()
        if answer.status != http.client.OK:
            raise RuntimeError(f"the store answered {answer.status} to a PUT")
        return time.perf_counter() - started
