"""A real Prometheus beside a real agent: it takes our rules, has data for our dashboard, and raises an alert."""

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.lab.seaweedfs import SeaweedServer, free_ports
from agent.lab.waiting import wait_until
from tests.monitoring.test_monitoring import MONITORING, dashboard_queries, rules
from tests.support.agent_process import RunPitr
from tests.support.stack import Stack

PROMETHEUS = shutil.which("prometheus")
SECONDS = 120.0
NOT_OF_AN_AGENT_THAT_IS_WELL = ("pitr_restore_stage", "pitr_drill_")

pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus (Debian: prometheus) is absent")


@dataclass
class Prometheus:
    """A running server."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of its HTTP API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=SECONDS) as answer:
            told = json.load(answer)
        assert told["status"] == "success"
        return told["data"]

    def is_ready(self) -> bool:
        try:
            return bool(self.ask("query", query="pitr_agent_info")["result"])
        except OSError:
            return False


def quick_rules() -> dict[str, Any]:
    """Return our rules, without the patience that the alert of this test has with its store."""
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]
    (store,) = (rule for group in groups for rule in group["rules"] if rule["alert"] == "PitrStoreUnreachable")
    assert "pitr_repository_failing_seconds > 120" in store["expr"]
    store["expr"] = store["expr"].replace(
        "pitr_repository_failing_seconds > 120", "pitr_repository_failing_seconds > 0"
    )
    del store["for"]
    return {"groups": groups}


@pytest.fixture
def prometheus(stack: Stack, tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the stack's agent, as PodMonitor and Kubernetes would label it."""
    assert PROMETHEUS is not None
    target = {"targets": [stack.agent.url.removeprefix("http://")]}
    labels = {"namespace": "summit", "pod": "postgres-0"}
    configuration = {
        "global": {"scrape_interval": "2s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "pitr", "static_configs": [{**target, "labels": labels}]}],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(quick_rules()))
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    command = [
        PROMETHEUS,
        "--config.file=prometheus.yaml",
        "--storage.tsdb.path=data",
        f"--web.listen-address={address}",
    ]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            server = Prometheus(f"http://{address}")
            wait_until(server.is_ready, seconds=SECONDS, what="prometheus to have asked the agent")
            yield server
        finally:
            process.terminate()


def test_prometheus_takes_every_rule_and_has_what_the_dashboard_shows_and_tells_of_a_store_that_is_away(
    stack: Stack, s3_server_of_its_own: SeaweedServer, prometheus: Prometheus, pitr: RunPitr
) -> None:
    assert pitr("backup", "now", settings=stack.agent.settings).returncode == 0
    stack.cluster.wait_until_archived(stack.cluster.switch_wal())
    settled = (
        "pitr_window_to_timestamp_seconds > 0 and pitr_wal_written_bytes_per_second "
        'and on (pod) increase(pitr_backups_total{kind="full",result="ok"}[1h]) > 0'
    )
    wait_until(
        lambda: prometheus.ask("query", query=settled)["result"], seconds=SECONDS, what="window, rates and backup"
    )

    for query in dashboard_queries():
        if "label_values" in query:
            continue
        asked = query.replace("$__rate_interval", "10m").replace("$namespace", "summit").replace("$pod", "postgres-.*")

        def result(asked: str = asked) -> list[Any]:
            found: list[Any] = prometheus.ask("query", query=asked)["result"]
            return found

        if any(name in query for name in NOT_OF_AN_AGENT_THAT_IS_WELL):
            result()  # it is understood
        else:
            wait_until(result, seconds=SECONDS, what=query)

    def evaluated() -> bool:
        groups = prometheus.ask("rules")["groups"]
        return all(rule["health"] != "unknown" for group in groups for rule in group["rules"])

    def firing() -> dict[str, dict[str, Any]]:
        alerts = prometheus.ask("alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}

    wait_until(evaluated, seconds=SECONDS, what="every rule to be evaluated")
    told = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in told} == dict.fromkeys((each["alert"] for each in rules()), "ok")
    assert firing() == {}

    s3_server_of_its_own.stop()
    stack.cluster.execute("CREATE TABLE written_meanwhile ()")
    stack.cluster.switch_wal()
    wait_until(firing, seconds=SECONDS, what="an alert")
    assert list(firing()) == ["PitrStoreUnreachable"]
    assert firing()["PitrStoreUnreachable"]["annotations"]["description"].startswith("summit/postgres-0: ")
