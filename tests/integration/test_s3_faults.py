"""What goes wrong between the agent and S3, and what the agent makes of it: a real S3 server behind a fault proxy."""

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import boto3
import pytest
import structlog

from agent.errors import RepositoryCorrupt, RepositoryError, RepositoryRefused, RepositoryUnavailable
from agent.lab.seaweedfs import SeaweedServer
from agent.ports import Body, ObjectStore
from agent.settings import load_settings
from agent.storage.clock import SystemClock
from agent.storage.retrying import Retry, RetryingStore
from agent.storage.s3 import S3ObjectStore
from agent.storage.s3_bucket import TimeLimits
from tests.support.fault_proxy import Fault, FaultProxy

BODY = bytes(range(256)) * (3 << 12)  # 3 MiB
Open = Callable[..., Awaitable[ObjectStore]]


@pytest.fixture
async def proxy(s3_server: SeaweedServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(s3_server.endpoint) as running:
        yield running


@pytest.fixture
async def open_through(proxy: FaultProxy, s3_environment: dict[str, str]) -> AsyncIterator[Open]:
    """Opens stores behind the proxy, with `environment` over the settings, that retry for `retry_seconds`."""
    async with AsyncExitStack() as stores:

        async def open_store(
            *, retry_seconds: float = 0, limits: TimeLimits | None = None, **environment: str
        ) -> ObjectStore:
            settings = load_settings({**s3_environment, "AWS_ENDPOINT": proxy.endpoint, **environment}).s3
            assert settings is not None
            retry = Retry(SystemClock(), retry_seconds)
            store = RetryingStore(await S3ObjectStore.connect(settings, retry, limits), retry)
            stores.push_async_callback(store.close)
            return store

        yield open_store


@pytest.fixture
async def store(open_through: Open) -> ObjectStore:
    """A store that does not retry and has found out what the server understands."""
    opened = await open_through()
    await opened.put("first", b"")
    return opened


@pytest.fixture
async def patient(open_through: Open) -> ObjectStore:
    """A store that retries and has found out what the server understands."""
    opened = await open_through(retry_seconds=60)
    await opened.put("first", b"")
    return opened


async def body_of(store: ObjectStore, key: str) -> bytes:
    stored = await store.get(key)
    assert stored is not None
    return stored.body


async def streamed(store: ObjectStore, key: str) -> bytes:
    async with store.open(key) as pieces:
        assert pieces is not None
        return b"".join([piece async for piece in pieces])


async def repeated(chunk: bytes, times: int) -> AsyncIterator[Body]:
    for _ in range(times):
        yield chunk


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (503, "SlowDown", RepositoryUnavailable),
        (500, "InternalError", RepositoryUnavailable),
        (429, "TooManyRequests", RepositoryUnavailable),
        (502, "BadGateway", RepositoryUnavailable),
        (400, "RequestTimeout", RepositoryUnavailable),
        (400, "ExpiredToken", RepositoryUnavailable),
        (403, "RequestTimeTooSkewed", RepositoryUnavailable),
        (409, "OperationAborted", RepositoryUnavailable),
        (403, "AccessDenied", RepositoryRefused),
        (403, "InvalidObjectState", RepositoryRefused),
        (301, "PermanentRedirect", RepositoryRefused),
        (400, "AuthorizationHeaderMalformed", RepositoryRefused),
        (400, "KMS.DisabledException", RepositoryRefused),
        (404, "NotFound", RepositoryRefused),
    ],
)
async def test_an_error_of_the_store_is_named_and_never_taken_for_absent(
    store: ObjectStore, proxy: FaultProxy, status: int, code: str, expected: type[RepositoryError]
) -> None:
    proxy.add(Fault(path="/key", status=status, code=code, times=100))
    for call in (store.get("key"), streamed(store, "key"), store.put_if_absent("key", b"x")):
        with pytest.raises(expected, match=code) as caught:
            await call
        assert "test/" in caught.value.message
        assert "\n" not in caught.value.one_line()


@pytest.mark.parametrize("status", [301, 403, 404, 500, 503])
async def test_a_head_without_a_reason_is_not_absent(store: ObjectStore, proxy: FaultProxy, status: int) -> None:
    await store.put("key", b"x")
    proxy.add(Fault(method="HEAD", status=status))
    with pytest.raises(RepositoryError):
        await store.head("key")


async def test_a_store_that_stumbles_is_asked_again(patient: ObjectStore, proxy: FaultProxy) -> None:
    for method in ("PUT", "GET", "HEAD", "POST"):
        proxy.add(
            Fault(method, status=503, code="SlowDown"), Fault(method, drop_answer=True), Fault(method, reset=True)
        )
    await patient.put("key", BODY)
    assert await body_of(patient, "key") == BODY
    assert await patient.head("key") is not None
    assert [info.key async for info in patient.list("")] == ["first", "key"]
    await patient.delete(["first", "key"])
    assert [info.key async for info in patient.list("")] == []


async def test_a_connection_cut_while_reading_is_an_error(store: ObjectStore, proxy: FaultProxy) -> None:
    await store.put("key", BODY)
    for reset in (False, True):
        proxy.add(Fault("GET", cut_after=2_000_000, reset=reset))
        with pytest.raises(RepositoryUnavailable):
            await body_of(store, "key")
        proxy.add(Fault("GET", cut_after=2_000_000, reset=reset))
        with pytest.raises(RepositoryUnavailable):
            await streamed(store, "key")


async def test_reading_goes_on_where_the_connection_was_cut(patient: ObjectStore, proxy: FaultProxy) -> None:
    await patient.put("key", BODY)
    proxy.requests.clear()
    proxy.add(
        Fault("GET", cut_after=0), Fault("GET", cut_after=1_500_000), Fault("GET", cut_after=1_200_000, reset=True)
    )
    assert await streamed(patient, "key") == BODY
    assert len(proxy.requests) == 4


async def test_an_object_replaced_while_it_is_read_is_an_error(patient: ObjectStore, proxy: FaultProxy) -> None:
    await patient.put("key", BODY)
    proxy.add(Fault("GET", cut_after=1_500_000))
    async with patient.open("key") as opened:
        assert opened is not None
        await anext(opened.pieces)
        await patient.put("key", BODY[::-1])
        with pytest.raises(RepositoryCorrupt, match="replaced"):
            [piece async for piece in opened.pieces]


async def test_an_answer_lost_after_the_commit_leaves_the_object_and_no_second_winner(
    patient: ObjectStore, proxy: FaultProxy
) -> None:
    proxy.add(Fault("PUT", path="/key", drop_answer=True))
    await patient.put_if_absent("key", b"content")  # True or False: the caller compares
    assert await body_of(patient, "key") == b"content"
    assert not await patient.put_if_absent("key", b"other")


async def test_a_body_damaged_on_its_way_is_not_stored(store: ObjectStore, proxy: FaultProxy) -> None:
    proxy.add(Fault("PUT", flip_sent_byte=1000))
    with pytest.raises(RepositoryUnavailable, match="BadDigest"):
        await store.put("key", BODY)
    assert await store.get("key") is None


async def test_a_part_damaged_on_its_way_is_sent_again(patient: ObjectStore, proxy: FaultProxy) -> None:
    proxy.add(Fault("PUT", path="partNumber=2", flip_sent_byte=1000))
    assert await patient.put_stream("key", repeated(BODY, 12)) == 12 * len(BODY)
    assert await streamed(patient, "key") == 12 * BODY


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", path="uploads", status=403, code="AccessDenied"),
        Fault("POST", path="uploads", status=503),
        Fault("PUT", path="partNumber=1", reset=True, drop_answer=True),
        Fault("PUT", path="partNumber=2", drop_answer=True),
        Fault("PUT", path="partNumber=3", status=500),
        Fault("POST", path="uploadId", status=503),
        Fault("POST", path="uploadId", drop_answer=True),
    ],
    ids=[
        "list refused",
        "begin",
        "first part reset",
        "second part unanswered",
        "third part refused",
        "complete",
        "complete, unheard",
    ],
)
async def test_a_multipart_upload_outlives_a_fault(patient: ObjectStore, proxy: FaultProxy, fault: Fault) -> None:
    proxy.add(fault)
    assert await patient.put_stream("key", repeated(BODY, 12)) == 12 * len(BODY)
    assert await streamed(patient, "key") == 12 * BODY


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", path="partNumber=1", status=503),
        Fault("PUT", path="partNumber=2", status=403, code="AccessDenied"),
        Fault("POST", path="uploadId", status=503),
        Fault("POST", path="uploadId", status=200),
    ],
    ids=["first part", "second part", "complete", "complete: 200 with an error"],
)
async def test_a_multipart_upload_that_fails_leaves_nothing(
    store: ObjectStore, proxy: FaultProxy, s3_server: SeaweedServer, fault: Fault
) -> None:
    proxy.add(fault)
    with pytest.raises(RepositoryError):
        await store.put_stream("key", repeated(BODY, 12))
    assert await store.get("key") is None
    assert proxy.requests[-2][0] == "DELETE"


@pytest.fixture
def unfinished(s3_server: SeaweedServer, s3_environment: dict[str, str]) -> Callable[..., dict[str, str]]:
    """Begins uploads below a prefix that begins with ours; returns those that are unfinished, key to id."""
    bucket, _, prefix = s3_environment["WALG_S3_PREFIX"].removeprefix("s3://").partition("/")
    client = boto3.client(
        "s3", endpoint_url=s3_server.endpoint, region_name="us-east-1", aws_access_key_id=s3_server.access_key,
        aws_secret_access_key=s3_server.secret_key,
    )  # fmt: skip

    def begin(*ends: str) -> dict[str, str]:
        for end in ends:
            client.create_multipart_upload(Bucket=bucket, Key=prefix + end)
        listed = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])
        return {each["Key"]: each["UploadId"] for each in listed}

    return begin


def page_of_uploads(uploads: dict[str, str], *, is_last: bool, begun: str = "2020-02-02T02:02:02") -> bytes:
    """Return a listing as S3 gives it of uploads that were `begun` long ago; in a time without a zone, as some do."""
    key, upload = list(uploads.items())[-1]
    more = "" if is_last else f"<NextKeyMarker>{key}</NextKeyMarker><NextUploadIdMarker>{upload}</NextUploadIdMarker>"
    entries = "".join(
        f"<Upload><Key>{key}</Key><UploadId>{upload}</UploadId><Initiated>{begun}</Initiated></Upload>"
        for key, upload in uploads.items()
    )
    truncated = f"<IsTruncated>{str(not is_last).lower()}</IsTruncated>"
    return f"<ListMultipartUploadsResult>{truncated}{more}{entries}</ListMultipartUploadsResult>".encode()


async def test_what_killed_processes_began_to_upload_is_removed_when_it_is_old(
    open_through: Open, proxy: FaultProxy, unfinished: Callable[..., dict[str, str]]
) -> None:
    begun = unfinished("/new.tar", "/old1.tar", "/old2.tar", "0/beside.tar")
    old = {key: upload for key, upload in begun.items() if "/old" in key}
    first, second = ({key: upload} for key, upload in old.items())
    proxy.add(Fault("GET", path="uploads", answer_body=page_of_uploads(first, is_last=False)))
    proxy.add(Fault("GET", path="uploads", answer_body=page_of_uploads(second, is_last=True)))
    store = await open_through()
    assert await store.put_stream("key", repeated(BODY, 6)) == 6 * len(BODY)
    assert unfinished() == {key: upload for key, upload in begun.items() if key not in old}
    looks = [path for method, path in proxy.requests if method == "GET" and "uploads" in path]
    assert len(looks) == 2
    assert all(f"key-marker={key}" in looks[1] for key in first)


async def test_unfinished_uploads_are_looked_for_once_below_the_own_prefix(
    open_through: Open, proxy: FaultProxy, unfinished: Callable[..., dict[str, str]]
) -> None:
    begun = unfinished("/new.tar", "0/beside.tar")
    store = await open_through()
    for number in range(2):
        assert await store.put_stream(f"key{number}", repeated(BODY, 6)) == 6 * len(BODY)
    assert unfinished() == begun
    looks = [path for method, path in proxy.requests if method == "GET" and "uploads" in path]
    assert len(looks) == 1
    assert re.search(r"prefix=[^&]*/(&|$)", looks[0])


async def test_a_list_of_unfinished_uploads_that_never_ends_is_looked_at_no_further(
    open_through: Open, proxy: FaultProxy, unfinished: Callable[..., dict[str, str]]
) -> None:
    again = page_of_uploads(unfinished("/old.tar"), is_last=False)
    proxy.add(Fault("GET", path="uploads", answer_body=again, times=1000))
    proxy.add(Fault("POST", path="uploadId", delay_seconds=1))  # time enough to look again and again
    store = await open_through()
    assert await store.put_stream("key", repeated(BODY, 6)) == 6 * len(BODY)
    assert sum(method == "GET" and "uploads" in path for method, path in proxy.requests) <= 2


async def test_an_upload_is_not_ended_by_unfinished_ones_of_no_known_time(
    open_through: Open, proxy: FaultProxy, unfinished: Callable[..., dict[str, str]]
) -> None:
    begun = unfinished("/old.tar")
    page = page_of_uploads(begun, is_last=True, begun="long ago")
    timeless = page.replace(b"<Initiated>long ago</Initiated>", b"")
    for answer in (page, timeless):
        proxy.add(Fault("GET", path="uploads", answer_body=answer))
        proxy.add(Fault("POST", path="uploadId", delay_seconds=1))  # for the look to come first
        store = await open_through()
        assert await store.put_stream("key", repeated(BODY, 6)) == 6 * len(BODY)
    assert not proxy.pending()
    assert unfinished() == begun


async def test_an_upload_does_not_wait_for_a_look_at_unfinished_ones(open_through: Open, proxy: FaultProxy) -> None:
    proxy.add(Fault("GET", path="uploads", black_hole=True))
    store = await open_through()
    async with asyncio.timeout(60):
        for number in range(2):
            assert await store.put_stream(f"key{number}", repeated(BODY, 6)) == 6 * len(BODY)
    assert sum(method == "GET" and "uploads" in path for method, path in proxy.requests) == 2


async def test_a_completed_upload_is_known_again_by_its_parts(patient: ObjectStore, proxy: FaultProxy) -> None:
    proxy.add(Fault("POST", path="uploadId", drop_answer=True))
    proxy.add(Fault("POST", path="uploadId", status=404, code="NoSuchUpload"))
    assert await patient.put_stream("key", repeated(BODY, 12)) == 12 * len(BODY)
    proxy.add(Fault("POST", path="uploadId", status=404, code="NoSuchUpload"))
    with pytest.raises(RepositoryRefused, match="NoSuchUpload"):
        await patient.put_stream("key", repeated(BODY[::-1], 12))


async def test_an_upload_that_turns_out_to_be_complete_is_not_said_to_be_left_behind(
    patient: ObjectStore, proxy: FaultProxy
) -> None:
    assert await patient.put_stream_if_absent("other", repeated(BODY, 12)) == 12 * len(BODY)
    proxy.add(Fault("POST", path="uploadId", drop_answer=True))
    proxy.add(Fault("POST", path="uploadId", status=412, code="PreconditionFailed"))
    proxy.add(Fault("DELETE", path="uploadId", status=404, code="NoSuchUpload"))
    with structlog.testing.capture_logs() as lines:
        assert await patient.put_stream_if_absent("key", repeated(BODY, 12)) is None
    assert not proxy.pending()
    assert await streamed(patient, "key") == 12 * BODY
    assert "multipart upload left behind" not in [line["event"] for line in lines]


async def test_a_stream_of_which_less_was_stored_is_an_error(store: ObjectStore, proxy: FaultProxy) -> None:
    await store.put("key", b"shorter")
    proxy.add(Fault("POST", path="uploadId", status=200, answer_body=b"<CompleteMultipartUploadResult/>"))
    with pytest.raises(RepositoryUnavailable, match="bytes"):
        await store.put_stream("key", repeated(BODY, 6))


async def test_a_store_that_ignores_conditions_is_found_out(open_through: Open, proxy: FaultProxy) -> None:
    proxy.add(Fault("PUT", strip_header="If-None-Match", times=1000))
    store = await open_through()
    assert await store.put_if_absent("key", b"first")
    assert not await store.put_if_absent("key", b"second")
    won = await asyncio.gather(*[store.put_if_absent("race", bytes([racer])) for racer in range(8)])
    assert won.count(True) == 1
    assert await body_of(store, "race") == bytes([won.index(True)])
    assert await body_of(store, "key") == b"first"


async def test_a_store_that_refuses_conditions_or_checksums_is_used_without(
    open_through: Open, proxy: FaultProxy
) -> None:
    proxy.add(Fault("PUT", path="pitr_probe", status=400, code="InvalidArgument"))  # the CRC32C
    proxy.add(Fault("PUT", path="pitr_probe", times=1))  # the MD5 passes
    proxy.add(Fault("PUT", path="pitr_probe", status=501, code="NotImplemented"))  # the condition
    store = await open_through()
    assert await store.put_if_absent("key", BODY)
    assert not await store.put_if_absent("key", b"second")
    assert await store.put_stream("parts", repeated(BODY, 6)) == 6 * len(BODY)
    assert await streamed(store, "parts") == 6 * BODY
    assert [info.key async for info in store.list("")] == ["key", "parts"]


async def test_a_refusal_that_passes_does_not_turn_conditional_writes_off(
    open_through: Open, proxy: FaultProxy
) -> None:
    proxy.add(Fault("PUT", path="pitr_probe", times=1))  # the first write of the probe passes
    proxy.add(Fault("PUT", path="pitr_probe", status=403, code="AccessDenied"))
    store = await open_through()
    with pytest.raises(RepositoryRefused, match="AccessDenied"):
        await store.put_if_absent("key", b"x")
    won = await asyncio.gather(*[store.put_if_absent("key", b"x") for _ in range(4)])
    assert won.count(True) == 1
    looks = [method for method, path in proxy.requests if path.endswith("/key")]
    assert looks == ["PUT"] * 4  # without conditions each write would look first
    assert [info.key async for info in store.list("pitr_probe")] == []


async def test_the_store_is_probed_once_and_the_probe_is_removed(open_through: Open, proxy: FaultProxy) -> None:
    store = await open_through()
    await asyncio.gather(*[store.put_if_absent(f"key{number}", b"x") for number in range(8)])
    probes = [method for method, path in proxy.requests if "pitr_probe" in path]
    assert probes == ["PUT", "PUT"]
    assert [info.key async for info in store.list("pitr_probe")] == []


async def test_objects_are_deleted_one_by_one_where_that_is_all_there_is(store: ObjectStore, proxy: FaultProxy) -> None:
    await store.put("a", b"x")
    proxy.add(Fault("POST", path="delete", status=501, code="NotImplemented"))
    await store.delete(["a", "first", "absent"])
    assert [info.key async for info in store.list("")] == []
    proxy.requests.clear()
    await store.put("a", b"x")
    assert not (await store.delete_many(["a", "absent"])).failed
    assert [method for method, _ in proxy.requests] == ["PUT", "DELETE", "DELETE"]  # it need not be told twice


async def test_a_locked_object_does_not_keep_the_others(store: ObjectStore, proxy: FaultProxy) -> None:
    await store.put("a", b"x")
    locked = (
        b"<DeleteResult><Error><Key>%s</Key><Code>AccessDenied</Code><Message>WORM</Message></Error></DeleteResult>"
    )
    root = next(path for method, path in proxy.requests if method == "PUT").split("/", 2)[2].rpartition("/")[0]
    proxy.add(Fault("POST", path="delete", answer_body=locked % f"{root}/first".encode()))
    deletion = await store.delete_many(["a", "first"])
    assert list(deletion.failed) == ["first"]
    assert isinstance(deletion.failed["first"], RepositoryRefused)
    assert "WORM" in deletion.failed["first"].message
    proxy.add(Fault("POST", path="delete", status=501, code="NotImplemented"))
    await store.put("a", b"x")
    await store.put("first", b"x")
    proxy.add(Fault("DELETE", path="first", status=403, code="AccessDenied"))
    assert list((await store.delete_many(["a", "first"])).failed) == ["first"]
    assert [info.key async for info in store.list("")] == ["first"]


async def test_what_was_not_deleted_for_a_passing_reason_is_tried_again(
    patient: ObjectStore, proxy: FaultProxy
) -> None:
    await patient.put("a", b"x")
    root = next(path for method, path in proxy.requests if method == "PUT").split("/", 2)[2].rpartition("/")[0]
    slow = f"<DeleteResult><Error><Key>{root}/a</Key><Code>SlowDown</Code></Error></DeleteResult>".encode()
    proxy.add(Fault("POST", path="delete", answer_body=slow))
    assert not (await patient.delete_many(["a", "first"])).failed
    assert [info.key async for info in patient.list("")] == []


_ENTRY = b"<Contents><Key>k</Key><Size>1</Size><LastModified>%s</LastModified></Contents></ListBucketResult>"


@pytest.mark.parametrize(
    "rest", [b"</ListBucketResult>", b"", _ENTRY % b"noon"], ids=["no token", "malformed", "no time"]
)
async def test_a_list_that_does_not_say_how_it_goes_on_is_an_error(
    store: ObjectStore, proxy: FaultProxy, rest: bytes
) -> None:
    page = b"<ListBucketResult><IsTruncated>true</IsTruncated>" + rest
    proxy.add(Fault("GET", path="list-type", answer_body=page))
    with pytest.raises(RepositoryUnavailable):
        assert [info.key async for info in store.list("")] == ["first"]


async def test_a_list_that_goes_on_where_it_has_been_is_an_error(store: ObjectStore, proxy: FaultProxy) -> None:
    page = b"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>2</NextContinuationToken>"
    proxy.add(Fault("GET", path="list-type", answer_body=page + b"</ListBucketResult>", times=1000))
    proxy.requests.clear()
    with pytest.raises(RepositoryUnavailable, match="does not say how its list of  goes on"):
        assert [info.key async for info in store.list("")] == []
    assert len(proxy.requests) == 2


async def test_versions_are_asked_for_no_more_once_that_was_refused(store: ObjectStore, proxy: FaultProxy) -> None:
    proxy.add(Fault("GET", path="versions", status=500))
    with pytest.raises(RepositoryUnavailable):
        await store.deleted_versions("first")
    proxy.add(Fault("GET", path="versions", status=403, code="AccessDenied"))
    proxy.requests.clear()
    for _ in range(2):
        assert await store.deleted_versions("first") == {}
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("code", ["NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
async def test_what_does_not_say_that_versions_are_not_told_is_an_error(
    store: ObjectStore, proxy: FaultProxy, code: str
) -> None:
    proxy.add(Fault("GET", path="versions", status=403, code=code))
    with pytest.raises(RepositoryRefused):
        await store.deleted_versions("first")
    proxy.requests.clear()
    assert await store.deleted_versions("first") == {}
    assert len(proxy.requests) == 1, "it is asked again"


async def test_an_object_that_could_not_be_deleted_is_an_error(store: ObjectStore, proxy: FaultProxy) -> None:
    failure = b"<DeleteResult><Error><Key>first</Key><Code>InternalError</Code></Error></DeleteResult>"
    proxy.add(Fault("POST", path="delete", answer_body=failure))
    with pytest.raises(RepositoryUnavailable, match="InternalError"):
        await store.delete(["first"])


async def test_an_answer_that_is_not_s3s_is_an_error(store: ObjectStore, proxy: FaultProxy) -> None:
    proxy.add(Fault("GET", answer_body=b"<html>Welcome to the hotel's network"))
    with pytest.raises(RepositoryUnavailable):
        await store.check()


async def test_a_store_that_falls_silent_is_given_up_in_time(open_through: Open, proxy: FaultProxy) -> None:
    store = await open_through(limits=TimeLimits(silence=0.3))
    proxy.add(Fault(black_hole=True, times=100))
    for call in (store.get("key"), store.check()):
        with pytest.raises(RepositoryUnavailable, match="did not answer in time"):
            async with asyncio.timeout(60):
                await call
    slow = await open_through(limits=TimeLimits(request=0.3))
    with pytest.raises(RepositoryUnavailable, match="did not answer in time"):
        async with asyncio.timeout(60):
            await slow.check()


async def test_nobody_waits_for_the_connections_of_others(open_through: Open) -> None:
    store = await open_through(limits=TimeLimits(request=20))
    await store.put("large", bytes(24 << 20))  # more than is read before anybody asks
    async with asyncio.timeout(120), AsyncExitStack() as readers:
        for _ in range(70):
            assert await readers.enter_async_context(store.open("large")) is not None
        assert await store.head("large") is not None


async def test_a_store_that_is_away_is_waited_for(patient: ObjectStore, proxy: FaultProxy) -> None:
    await proxy.stop()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        storing = group.create_task(patient.put_if_absent("key", b"x"))
        await asyncio.sleep(0)
        await proxy.start()
    assert storing.result()


@pytest.mark.parametrize(
    ("environment", "expected", "message", "hint"),
    [
        ({"WALG_S3_PREFIX": "s3://no-such-bucket/x"}, RepositoryRefused, '"no-such-bucket"', "WALG_S3_PREFIX"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, RepositoryRefused, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "wr0ng"}, RepositoryRefused, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ENDPOINT": "http://127.0.0.1:1"}, RepositoryUnavailable, "127.0.0.1:1", "AWS_ENDPOINT"),
        ({"AWS_ENDPOINT": "http://s3.invalid"}, RepositoryUnavailable, "s3.invalid", "AWS_ENDPOINT"),
        ({"AWS_ENDPOINT": "https://no url"}, RepositoryRefused, "no url", "AWS_ENDPOINT"),
        ({"AWS_ENDPOINT": f"http://{'long' * 20}.example"}, RepositoryRefused, "long", "AWS_ENDPOINT"),
    ],
)
async def test_a_wrong_setting_is_named(
    open_through: Open, environment: dict[str, str], expected: type[RepositoryError], message: str, hint: str
) -> None:
    with pytest.raises(expected) as caught:
        await (await open_through(**environment)).check()
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "wr0ng" not in caught.value.one_line()


async def test_credentials_that_may_only_read_are_refused_a_write(open_through: Open, s3_server: SeaweedServer) -> None:
    reader = {
        "AWS_ACCESS_KEY_ID": s3_server.reader_access_key,
        "AWS_SECRET_ACCESS_KEY": s3_server.reader_secret_key,
    }
    store = await open_through(**reader)
    await store.check()
    assert await store.get("key") is None
    with pytest.raises(RepositoryRefused, match="AccessDenied") as caught:
        await store.put_if_absent("key", b"x")
    assert "PutObject" in caught.value.hint


async def test_no_credentials_at_all_are_refused(
    open_through: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    with pytest.raises(RepositoryRefused, match="no credentials") as caught:
        await open_through(AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint


def self_signed(directory: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1, and its key."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"))


async def test_a_ca_that_is_replaced_is_trusted_by_who_runs_already(
    open_through: Open, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    with SeaweedServer(tmp_path / "s3", certificate=certificate) as server:
        server.create_bucket("tls-bucket")
        trusted, _ = self_signed(tmp_path)
        environment = {**server.environment("tls-bucket", "x"), "AWS_ENDPOINT": str(server.https_endpoint)}
        store = await open_through(**environment, WALG_S3_CA_CERT_FILE=str(trusted))
        with pytest.raises(RepositoryRefused, match="certificate"):
            await store.check()
        replacement = tmp_path / "replacement.pem"
        replacement.write_bytes(certificate[0].read_bytes())
        replacement.rename(trusted)
        await store.put("key", BODY)
        assert await streamed(store, "key") == BODY


@pytest.mark.parametrize("content", [None, b"no certificate"])
async def test_a_ca_file_that_cannot_be_used_is_named(
    open_through: Open, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "ca.pem").write_bytes(content)
    store = await open_through(WALG_S3_CA_CERT_FILE=str(tmp_path / "ca.pem"))
    with pytest.raises(RepositoryError, match=r"ca\.pem"):
        await store.check()


async def test_a_certificate_is_checked(open_through: Open, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    with SeaweedServer(tmp_path / "s3", certificate=certificate) as server:
        server.create_bucket("tls-bucket")
        environment = {**server.environment("tls-bucket", "x"), "AWS_ENDPOINT": str(server.https_endpoint)}
        with pytest.raises(RepositoryRefused, match="certificate") as caught:
            await (await open_through(**environment)).check()
        assert "WALG_S3_CA_CERT_FILE" in caught.value.hint
        trusting = await open_through(**environment, WALG_S3_CA_CERT_FILE=str(certificate[0]))
        await trusting.put("key", BODY)
        assert await streamed(trusting, "key") == BODY
        not_tls = {**environment, "AWS_ENDPOINT": server.endpoint.replace("http:", "https:")}
        with pytest.raises(RepositoryUnavailable, match=server.endpoint.removeprefix("http://")):
            await (await open_through(**not_tls)).check()


async def test_a_store_that_completes_uploads_whatever_is_there_is_found_out(
    open_through: Open, proxy: FaultProxy
) -> None:
    proxy.add(Fault("POST", path="uploadId", strip_header="If-None-Match", times=1000))
    store = await open_through()
    assert await store.put_stream_if_absent("key", repeated(BODY, 6)) == 6 * len(BODY)
    assert await store.put_stream_if_absent("key", repeated(BODY[::-1], 6)) is None
    sizes = await asyncio.gather(*[store.put_stream_if_absent("race", repeated(BODY, 6)) for _ in range(3)])
    assert sorted(size is None for size in sizes) == [False, True, True]
    assert await streamed(store, "key") == 6 * BODY
    assert [info.key async for info in store.list("")] == ["key", "race"]


async def test_what_completes_uploads_conditionally_is_found_out_once(open_through: Open, proxy: FaultProxy) -> None:
    store = await open_through()
    for key in ("one", "two"):
        assert await store.put_stream_if_absent(key, repeated(BODY, 6)) == 6 * len(BODY)
        assert await store.put_stream_if_absent(key, repeated(BODY[::-1], 6)) is None
    probes = [method for method, path in proxy.requests if "pitr_probe" in path]
    assert probes == ["PUT", "PUT", "PUT", "POST", "PUT", "POST", "DELETE"]
