"""Whatever a Pushgateway does, what is pushed to it fails nothing and holds nothing up."""

import socket

from prometheus_client import generate_latest
from structlog.testing import capture_logs

from agent.telemetry.push import push, registry_of
from tests.support.pushgateway import pushgateway


async def test_values_arrive_under_their_job_and_repository_and_unknown_ones_are_left_out() -> None:
    with pushgateway() as gateway:
        values = {"pitr_restore_timeline": None, "pitr_restore_success": 1.0, "pitr_restore_stage_seconds": {"a": 2.0}}
        await push(gateway.url, "pitr_restore", "s3://b/p", values, keep_others=False)
        assert gateway.samples() == {"pitr_restore_success": 1, 'pitr_restore_stage_seconds{stage="a"}': 2}
        assert gateway.pushed[0][1].startswith("/metrics/job/pitr_restore/repository@base64/")


async def test_a_gateway_that_never_answers_or_is_not_there_costs_a_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        gone = closed.getsockname()[1]
        closed.close()
        for port in (silent.getsockname()[1], gone):
            with capture_logs() as logs:
                url = f"http://127.0.0.1:{port}"
                await push(url, "pitr_restore", "r", {"pitr_restore_success": 0}, keep_others=False, seconds=0.2)
            assert "metrics not pushed" in [line["event"] for line in logs]


def test_only_metrics_with_a_value_are_in_the_registry() -> None:
    assert generate_latest(registry_of({"pitr_restore_timeline": None})) == b""
