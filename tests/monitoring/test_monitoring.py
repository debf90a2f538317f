"""The alerts and the dashboard: they name metrics that exist, lead to a document, and fire when they should."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from agent.telemetry import findings
from agent.telemetry.metrics import Metrics
from agent.telemetry.push import DRILL_METRICS, RESTORE_METRICS

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "k8s" / "monitoring"
RUNBOOK = "docs/alerts.md"
# Kubernetes tells these of itself (kube-state-metrics).
FOREIGN = {"kube_job_created", "kube_job_failed"}
ON = '{namespace="summit",pod="postgres-0"}'
OTHER = '{namespace="summit",pod="other-0"}'
PUSHED = '{repository="s3://bucket/path"}'
AGENT = ('pitr_agent_info{namespace="summit",pod="postgres-0",mode="archive",version="1"}', "1x900")
PRIMARY = (f"pitr_postgres_is_primary{ON}", "1x300")
Series = tuple[str, str]

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is absent")
FIRES: dict[str, tuple[list[Series], str]] = {
    "PitrArchiveNotAdvancing": (
        [
            PRIMARY,
            (f"pitr_archive_last_success_timestamp_seconds{ON}", "60x300"),
            (f"pitr_wal_written_bytes_per_second{ON}", "10x300"),
        ],
        "25m",
    ),
    "PitrArchiveBacklogOld": ([(f"pitr_archive_backlog_age_seconds{ON}", "0+60x300")], "8m"),
    "PitrWalVolumeFillsUp": ([(f"pitr_wal_volume_seconds_until_full{ON}", "7100x300")], "3m"),
    "PitrWalGap": ([(f"pitr_wal_gaps{ON}", "0 1x300")], "2m"),
    "PitrWalCheckStale": ([PRIMARY, (f"pitr_wal_continuity_last_check_timestamp_seconds{ON}", "60x300")], "70m"),
    "PitrNoBaseBackup": ([(f"postgres_base_backup_last_success_timestamp{ON}", "-90000x300")], "2h"),
    "PitrBackupFailing": (
        [
            (f"postgres_base_backup_last_success_timestamp{ON}", "10x300"),
            (f"pitr_backup_last_failure_timestamp_seconds{ON}", "20x300"),
        ],
        "20m",
    ),
    "PitrBackupStalled": ([(f"pitr_backup_idle_seconds{ON}", "1900x300")], "1m"),
    "PitrBackupCorruptPages": ([(f"pitr_backup_corrupt_pages{ON}", "1x300")], "1m"),
    "PitrWindowShort": (
        [
            (f"pitr_retention_window_seconds{ON}", "604800x300"),
            (f"pitr_window_from_timestamp_seconds{ON}", "10000x300"),
            (f"pitr_backup_oldest_timestamp_seconds{ON}", "600x300"),
        ],
        "4h",
    ),
    "PitrRepositoryDamaged": ([(f"pitr_verify_problems{ON}", "2x300")], "1m"),
    "PitrExpiryFailing": ([(f"pitr_expire_failing{ON}", "1x300")], "80m"),
    "PitrStoreUnreachable": ([(f"pitr_repository_failing_seconds{ON}", "0+60x300")], "5m"),
    "PitrCredentialsExpire": ([(f"pitr_repository_credentials_expiry_timestamp_seconds{ON}", "3600x300")], "51m"),
    "PitrForeignCluster": ([(f"pitr_repository_foreign{ON}", "1x300")], "1m"),
    "PitrAgentAbsent": ([("pitr_agent_info" + ON[:-1] + ',mode="archive"}', "1x30")], "50m"),
    "PitrMemoryNearBudget": (
        [(f"pitr_memory_budget_bytes{ON}", "100x300"), (f"pitr_memory_budget_used_bytes{ON}", "96x300")],
        "20m",
    ),
    "PitrRestoreRunning": ([(f'pitr_restore_stage{ON[:-1]},stage="hydrating"}}', "1x300")], "1m"),
    "PitrRestoreFailed": (
        [('kube_job_failed{namespace="summit",job_name="postgres-pitr-restore",condition="true"}', "1x300")],
        "1m",
    ),
    "PitrDrillFailed": (
        [
            (f"pitr_drill_last_success_timestamp_seconds{PUSHED}", "20x300"),
            (f"pitr_drill_last_failure_timestamp_seconds{PUSHED}", "30x300"),
        ],
        "1m",
    ),
}
# Two ways to fire of which the table above shows one.
ALSO_FIRES: list[tuple[str, list[Series], str]] = [
    (
        "PitrWindowShort",  # somebody removed the oldest base backups
        [
            (f"pitr_retention_window_seconds{ON}", "604800x300"),
            (f"pitr_window_from_timestamp_seconds{ON}", "600x60 9000x240"),
            (f"pitr_backup_oldest_timestamp_seconds{ON}", "600x60 9000x240"),
        ],
        "4h",
    ),
    (
        "PitrWindowShort",  # base backups, and none with its WAL
        [(f"pitr_backups_complete{ON}", "2x300"), (f"pitr_window_from_timestamp_seconds{ON}", "0x300")],
        "30m",
    ),
    ("PitrVerificationStale", [(f"pitr_verify_failing{ON}", "1x300")], "130m"),
    ("PitrDrillFailed", [(f"pitr_drill_last_failure_timestamp_seconds{PUSHED}", "30x300")], "1m"),
    (
        "PitrDrillFailed",  # as the agents of two servers know it; the drills of the other one succeed
        [
            (f"pitr_drill_last_success_timestamp_seconds{ON}", "0x300"),
            (f"pitr_drill_last_failure_timestamp_seconds{ON}", "30x300"),
            (f"pitr_drill_last_success_timestamp_seconds{OTHER}", "30x300"),
            (f"pitr_drill_last_failure_timestamp_seconds{OTHER}", "0x300"),
        ],
        "1m",
    ),
    (
        "PitrDrillFailed",
        [('kube_job_failed{namespace="summit",job_name="postgres-pitr-drill-29",condition="true"}', "1x300")],
        "1m",
    ),
    ("PitrRestoreFailed", [(f"pitr_restore_success{PUSHED}", "0x300")], "1m"),
    ("PitrStoreUnreachable", [(f"pitr_repository_last_answer_timestamp_seconds{ON}", "0x300")], "15m"),
]
# In days, not minutes.
SLOW = [
    ("PitrExpiryFailing", "pitr_expire_last_success_timestamp_seconds"),
    ("PitrVerificationStale", "pitr_verify_last_check_timestamp_seconds"),
    ("PitrDrillStale", "pitr_drill_last_success_timestamp_seconds"),
]


@cache
def rules() -> list[dict[str, Any]]:
    """Return the alerting rules."""
    document = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    return [rule for group in document["spec"]["groups"] for rule in group["rules"]]


@cache
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return loaded


def dashboard_queries() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    yield from (each["query"] for each in dashboard()["templating"]["list"] if each["type"] == "query")


@cache
def exposed() -> frozenset[str]:
    """Return every name under which a metric of ours can be asked for."""
    registry = CollectorRegistry()
    Metrics(registry)
    names: set[str] = {*RESTORE_METRICS, *DRILL_METRICS}
    for family in registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return frozenset(names)


def metrics_in(query: str) -> set[str]:
    return set(re.findall(r"\b(?:pitr|postgres|kube)_\w+", re.sub(r'"[^"]*"', "", query)))


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_every_alert_names_metrics_that_exist_and_says_what_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert metrics_in(rule["expr"])
    assert metrics_in(rule["expr"]) <= exposed() | FOREIGN
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    assert rule["annotations"]["runbook_url"] == f"{RUNBOOK}#{rule['alert'].lower()}"


def test_every_alert_has_its_section_and_line_in_the_document_and_none_besides() -> None:
    text = (ROOT / RUNBOOK).read_text()
    severities = {rule["alert"]: rule["labels"]["severity"] for rule in rules()}
    assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == set(severities)
    assert dict(re.findall(r"^\| \[(\w+)\]\(#\w+\) \| (\w+) \|", text, re.MULTILINE)) == severities
    for anchor in re.findall(r"\]\(#(\w+)\)", text):
        assert anchor in {name.lower() for name in severities}


def test_every_finding_of_the_status_page_is_an_alert_of_the_same_severity_or_less() -> None:
    source = Path(findings.__file__).read_text()
    told = set(re.findall(r'"(Pitr\w+)"', source))
    assert told
    assert told <= {rule["alert"] for rule in rules()}


def test_the_limits_of_alerts_and_findings_are_the_same() -> None:
    expressions = {rule["alert"]: rule["expr"] for rule in rules()}
    for alert, limit in {
        "PitrArchiveBacklogOld": findings.RPO_SECONDS,
        "PitrArchiveNotAdvancing": findings.SILENT_SECONDS,
        "PitrStoreUnreachable": findings.UNREACHABLE_SECONDS,
        "PitrWalVolumeFillsUp": findings.VOLUME_FULL_SECONDS,
        "PitrNoBaseBackup": findings.BACKUP_AGE.total_seconds(),
        "PitrBackupStalled": findings.BACKUP_IDLE_SECONDS,
        "PitrCredentialsExpire": findings.CREDENTIALS_LEFT.total_seconds(),
        "PitrMemoryNearBudget": findings.MEMORY_SHARE,
        "PitrVerificationStale": findings.VERIFICATION_AGE.total_seconds(),
        "PitrDrillStale": findings.DRILL_AGE.total_seconds(),
        "PitrWindowShort": findings.WINDOW_TOLERANCE.total_seconds(),
    }.items():
        assert f"{limit:g}" in re.findall(r"[\d.]+", expressions[alert]), alert


@pytest.mark.parametrize("query", list(dashboard_queries()))
def test_every_query_of_the_dashboard_names_metrics_that_exist(query: str) -> None:
    assert metrics_in(query)
    assert metrics_in(query) <= exposed()


def test_counters_whose_increase_is_asked_for_begin_at_zero_for_each_value_of_their_labels() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    shown = {sample.name for family in registry.collect() for sample in family.samples}
    queries = [*dashboard_queries(), *(rule["expr"] for rule in rules())]
    counted = {name for query in queries for name in re.findall(r"increase\((\w+)", query)}
    assert counted
    assert counted <= shown


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not covered & cells, panel["title"]
        cells |= covered
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))


def promtool(directory: Path, *arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=directory, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def rules_directory(tmp_path: Path) -> Path:
    """A directory with the rules as Prometheus reads them."""
    document = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": document["spec"]["groups"]}))
    return tmp_path


@needs_promtool
def test_every_query_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    queries = [query for query in dashboard_queries() if "label_values" not in query]
    recorded = [
        {"record": f"query:number_{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(queries)
    ]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    promtool(tmp_path, "check", "rules", "queries.yaml")


@needs_promtool
def test_nothing_is_told_while_all_is_well(rules_directory: Path) -> None:
    promtool(rules_directory, "check", "rules", "rules.yaml")
    shutil.copy(Path(__file__).parent / "alerts.test.yaml", rules_directory)
    promtool(rules_directory, "test", "rules", "alerts.test.yaml")


def test_each_alert_is_made_to_fire() -> None:
    assert {*FIRES, *(alert for alert, _ in SLOW)} == {rule["alert"] for rule in rules()}


def fires(alert: str, series: list[Series], when: str, interval: str = "1m") -> dict[str, Any]:
    """Return promtool's test that `alert` fires, and nothing else, given `series`."""
    there = [] if alert == "PitrAgentAbsent" else [AGENT]
    return {
        "name": alert,
        "interval": interval,
        "input_series": [{"series": name, "values": values} for name, values in [*there, *series]],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": when,
                "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}],
            }
        ],
    }


def run_tests(directory: Path, tests: list[dict[str, Any]], interval: str = "1m") -> None:
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": interval, "tests": tests}
    (directory / "tests.yaml").write_text(yaml.safe_dump(document))
    promtool(directory, "test", "rules", "tests.yaml")


@needs_promtool
def test_each_alert_fires_for_what_it_is_there_for_and_no_other_with_it(rules_directory: Path) -> None:
    cases = [*((alert, *case) for alert, case in FIRES.items()), *ALSO_FIRES]
    run_tests(rules_directory, [fires(*case) for case in cases])


@needs_promtool
def test_a_failed_drill_whose_job_is_still_there_is_over_with_the_next_that_succeeds(rules_directory: Path) -> None:
    labels = 'namespace="summit",job_name="postgres-pitr-drill-29"'
    series = [
        (f'kube_job_failed{{{labels},condition="true"}}', "1x300"),
        (f"kube_job_created{{{labels}}}", "600x300"),
        (f"pitr_drill_last_success_timestamp_seconds{ON}", "300x60 4500x240"),
    ]
    test = fires("PitrDrillFailed", series, "59m")
    query = {"expr": 'ALERTS{alertstate="firing"}', "eval_time": "90m", "exp_samples": []}
    test["promql_expr_test"].append(query)
    run_tests(rules_directory, [test])


@needs_promtool
def test_a_drill_that_is_forgotten_with_its_base_backup_is_stale_all_the_same(rules_directory: Path) -> None:
    # Told for a day, then none is known: the agent was restarted after the base backup had expired.
    series = [(f"pitr_drill_last_success_timestamp_seconds{ON}", "3600x48 0x900")]
    run_tests(rules_directory, [fires("PitrDrillStale", series, "225h", interval="30m")], "30m")


@needs_promtool
@pytest.mark.parametrize(("alert", "metric"), SLOW)
def test_what_has_not_been_done_for_days_is_told(rules_directory: Path, alert: str, metric: str) -> None:
    run_tests(rules_directory, [fires(alert, [(f"{metric}{ON}", "1x900")], "225h", interval="30m")], "30m")
