"""The rules of `pitr check`: what they say of what was seen."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis.strategies import builds, lists, sampled_from, text

from agent.domain.checks import Finding, Section, Verdict, exit_code_of, failed, passed, skipped, warned
from agent.domain.server_checks import (
    ServerFacts,
    archive_command,
    functions_needed,
    hook_of,
    role_finding,
    setting_findings,
)
from agent.domain.store_checks import (
    BucketFacts,
    Credentials,
    LifecycleRule,
    Operation,
    StoreFacts,
    Trial,
    bucket_findings,
    store_findings,
)
from agent.domain.volume_checks import (
    RunningAgent,
    SocketFacts,
    VolumeFacts,
    agent_findings,
    hook_finding,
    identity_finding,
    key_finding,
    socket_finding,
    volume_findings,
)
from agent.errors import (
    AgentError,
    AgentUnavailable,
    ConfigError,
    PostgresError,
    RepositoryCorrupt,
    RepositoryRefused,
    RepositoryUnavailable,
    WalNotArchived,
    WalRefused,
    WrongKey,
)

HOOK = "/usr/local/bin/wal-archive.sh"
NOW = datetime(2026, 11, 23, 8, tzinfo=UTC)
REFUSED = RepositoryRefused("the store answered AccessDenied", hint="Allow it.")
HEALTHY = ServerFacts(
    version_num=170006,
    system_identifier=7,
    in_recovery=False,
    database="postgres",
    role="backup",
    is_superuser=False,
    reads_settings=True,
    may_execute=dict.fromkeys(functions_needed(17), True),
    settings={
        "wal_level": "replica",
        "archive_mode": "on",
        "archive_command": f"{HOOK} %p %f",
        "archive_library": "",
        "archive_timeout": "60",
        "full_page_writes": "on",
        "wal_segment_size": "16777216",
        "data_checksums": "on",
        "summarize_wal": "on",
    },
    pending_restart=frozenset(),
)
VOLUME = VolumeFacts("/pgdata", 7, 16 << 20, wal_is_ours=True, wal_free_bytes=100 << 30)
BUCKET = BucketFacts(
    prefix="db/",
    reads_ranges=True,
    compares_checksums=True,
    is_conditional=True,
    versioning="Off",
    lock=None,
    lifecycle=(),
    credentials=Credentials("AWS_ACCESS_KEY_ID", None, are_renewed=True),
)


def of_server(facts: ServerFacts, *, deltas: bool = True) -> dict[str, Finding]:
    findings = setting_findings(facts, hook=HOOK, uses_deltas=deltas, today=NOW.date())
    return {each.subject: each for each in findings}


def with_setting(name: str, value: str) -> Finding:
    return of_server(replace(HEALTHY, settings={**HEALTHY.settings, name: value}))[name]


def of_bucket(facts: BucketFacts, *, is_writable: bool = True) -> dict[str, Finding]:
    keeps = timedelta(days=14)
    return {each.subject: each for each in bucket_findings(facts, is_writable=is_writable, keeps=keeps)}


def verdicts(findings: Sequence[Finding]) -> set[Verdict]:
    return {each.verdict for each in findings}


@given(lists(sampled_from([ConfigError, PostgresError, RepositoryUnavailable, WalNotArchived])), lists(text()))
def test_the_exit_code_is_that_of_the_first_failure_and_0_without_one(
    kinds: list[type[AgentError]], others: list[str]
) -> None:
    fine = [*map(passed, others, others), *map(skipped, others, others), *(warned(each, each, "") for each in others)]
    failures = [failed("x", "y", "z", kind) for kind in kinds]
    sections = [Section("fine", tuple(fine)), *(Section("bad", (each, *fine)) for each in failures)]
    assert exit_code_of(sections) == (kinds[0].exit_code if kinds else 0)


def test_a_server_that_is_set_as_it_should_be_passes() -> None:
    assert verdicts([*of_server(HEALTHY).values(), role_finding(HEALTHY)]) == {Verdict.PASS}
    assert verdicts([*of_bucket(BUCKET).values(), *volume_findings(VOLUME, 7)]) == {Verdict.PASS}


@pytest.mark.parametrize(
    ("name", "value", "verdict", "fix"),
    [
        ("wal_level", "minimal", Verdict.FAIL, "ALTER SYSTEM SET wal_level = 'replica'; then restart PostgreSQL."),
        ("wal_level", "logical", Verdict.PASS, ""),
        ("archive_mode", "off", Verdict.FAIL, "ALTER SYSTEM SET archive_mode = 'on'; then restart PostgreSQL."),
        ("archive_mode", "always", Verdict.PASS, ""),
        (
            "archive_library",
            "basic_archive",
            Verdict.FAIL,
            "ALTER SYSTEM SET archive_library = ''; SELECT pg_reload_conf();",
        ),
        (
            "archive_timeout",
            "0",
            Verdict.WARN,
            "ALTER SYSTEM SET archive_timeout = '60'; SELECT pg_reload_conf();",
        ),
        (
            "full_page_writes",
            "off",
            Verdict.WARN,
            "ALTER SYSTEM SET full_page_writes = 'on'; SELECT pg_reload_conf();",
        ),
        (
            "data_checksums",
            "off",
            Verdict.WARN,
            "Stop PostgreSQL in order, then pg_checksums --enable --pgdata=PGDATA.",
        ),
        (
            "summarize_wal",
            "off",
            Verdict.WARN,
            "ALTER SYSTEM SET summarize_wal = 'on'; SELECT pg_reload_conf();",
        ),
        (
            "archive_cleanup_command",
            "pg_archivecleanup /archive %r",
            Verdict.WARN,
            "ALTER SYSTEM SET archive_cleanup_command = ''; SELECT pg_reload_conf();",
        ),
    ],
)
def test_a_setting_that_is_not_as_it_should_be_comes_with_its_fix(
    name: str, value: str, verdict: Verdict, fix: str
) -> None:
    finding = with_setting(name, value)
    assert (finding.verdict, finding.fix) == (verdict, fix)
    assert finding.exit_code == (10 if verdict is Verdict.FAIL else 0)


@pytest.mark.parametrize(
    ("command", "verdict"),
    [
        (f"{HOOK} %p %f", Verdict.PASS),
        ("'/opt/with space/wal-archive.sh' %p %f", Verdict.PASS),
        (f"{HOOK} %p %f && cp %p /copies/%f", Verdict.WARN),
        (f"env A=b {HOOK} %p %f", Verdict.WARN),
        (f"{HOOK} --socket /run/pitr/other.sock --timeout 60 %p %f", Verdict.PASS),
        (f"{HOOK} --socket %p %f", Verdict.WARN),
        (f"{HOOK} %f %p", Verdict.FAIL),
        (HOOK, Verdict.FAIL),
        (f"{HOOK} '%p %f", Verdict.WARN),
        ("/bin/true", Verdict.FAIL),
        ("cp %p /archive/%f", Verdict.FAIL),
        ("wal-g wal-push %p", Verdict.FAIL),
        ("", Verdict.FAIL),
        ("(disabled)", Verdict.SKIP),
    ],
)
def test_only_an_archive_command_that_calls_the_hook_as_it_is_passes(command: str, verdict: Verdict) -> None:
    finding = archive_command(command, HOOK)
    assert finding.verdict is verdict
    assert verdict is Verdict.PASS or f"'{HOOK} %p %f'" in finding.fix


def test_the_program_that_archive_command_calls_is_told_if_it_is_the_hook() -> None:
    commands = ["'/with space/wal-archive.sh' %p %f", f"{HOOK} %f", "wal-archive.sh", "/bin/true", "'", ""]
    assert [hook_of(each) for each in commands] == ["/with space/wal-archive.sh", HOOK, "wal-archive.sh", *[None] * 3]


def test_the_command_that_is_proposed_survives_shell_and_sql_with_any_path() -> None:
    fix = archive_command("", "/it's here/wal-archive.sh").fix
    statement = fix.removeprefix("ALTER SYSTEM SET archive_command = '").partition("'; SELECT")[0]
    assert hook_of(statement.replace("''", "'")) == "/it's here/wal-archive.sh"


@given(text())
def test_any_archive_command_is_judged_and_never_passes_unless_it_ends_with_the_hooks_arguments(command: str) -> None:
    assert archive_command(command, HOOK).verdict is not Verdict.PASS or command.rstrip().endswith("%f")


@pytest.mark.parametrize(
    ("version_num", "verdict"),
    [
        (120020, Verdict.FAIL),
        (130004, Verdict.WARN),
        (140003, Verdict.WARN),
        (150000, Verdict.PASS),
        (180006, Verdict.PASS),
        (190000, Verdict.FAIL),
    ],
)
def test_versions_that_are_broken_old_or_unknown_are_told(version_num: int, verdict: Verdict) -> None:
    assert of_server(replace(HEALTHY, version_num=version_num))["version"].verdict is verdict


def test_a_major_version_is_told_from_the_day_after_its_support_ended() -> None:
    facts = replace(HEALTHY, version_num=150018)

    def on(today: date) -> Verdict:
        return next(iter(setting_findings(facts, hook=HOOK, uses_deltas=False, today=today))).verdict

    assert (on(date(2027, 11, 11)), on(date(2027, 11, 12))) == (Verdict.PASS, Verdict.WARN)


def test_what_a_version_does_not_have_is_not_asked_of_it() -> None:
    assert "archive_library" not in of_server(replace(HEALTHY, version_num=140010))
    assert "summarize_wal" not in of_server(replace(HEALTHY, version_num=160010))
    assert "summarize_wal" not in of_server(HEALTHY, deltas=False)


def test_a_setting_that_is_not_shown_is_skipped_and_one_that_waits_for_a_restart_fails() -> None:
    hidden = {name: value for name, value in HEALTHY.settings.items() if name != "archive_command"}
    assert of_server(replace(HEALTHY, settings=hidden))["archive_command"].verdict is Verdict.SKIP
    changed = of_server(replace(HEALTHY, pending_restart=frozenset({"archive_mode"})))["archive_mode"]
    assert (changed.verdict, changed.fix) == (Verdict.FAIL, "Restart PostgreSQL.")


@given(text(min_size=1), sampled_from([13, 14, 15, 16, 17, 18]))
def test_the_sql_for_a_role_names_all_it_lacks_and_quotes_its_name(role: str, major: int) -> None:
    lacking = replace(HEALTHY, version_num=major * 10_000, role=role, reads_settings=False, may_execute={})
    statements = role_finding(lacking).fix.partition("\n")[2]
    quoted = '"' + role.replace('"', '""') + '"'
    grants = ["pg_read_all_settings", *(f"EXECUTE ON FUNCTION {name}" for name in functions_needed(major))]
    assert statements == "\n".join(f"GRANT {each} TO {quoted};" for each in grants)
    assert ("pg_start_backup" in statements) == (major < 15)


def test_pgdata_is_compared_with_the_server_and_never_passes_unseen() -> None:
    def first(volume: VolumeFacts | AgentError, server: int | None) -> Finding:
        return next(volume_findings(volume, server))

    assert first(VOLUME, 8).exit_code == ConfigError.exit_code
    assert first(VOLUME, None).verdict is Verdict.SKIP
    assert first(ConfigError("PGDATA is not set"), 7).exit_code == ConfigError.exit_code
    few = replace(VOLUME, wal_free_bytes=63 * VOLUME.segment_bytes, wal_is_ours=False)
    assert [each.verdict for each in volume_findings(few, 7)] == [Verdict.PASS, Verdict.WARN, Verdict.WARN]


def test_a_hook_that_cannot_be_seen_from_here_does_not_pass() -> None:
    assert [hook_finding(HOOK, is_seen=seen).verdict for seen in (True, False)] == [Verdict.PASS, Verdict.SKIP]
    assert hook_finding(None, is_seen=False).verdict is Verdict.SKIP


def test_a_socket_directory_that_everybody_may_write_to_is_told() -> None:
    facts = SocketFacts("/run/pitr", is_open_to_all=True, is_volume=False)
    assert socket_finding(facts).fix == "chmod o-w /run/pitr"
    assert socket_finding(replace(facts, is_volume=True)).verdict is Verdict.PASS
    assert socket_finding(ConfigError("gone")).exit_code == ConfigError.exit_code


@pytest.mark.parametrize(
    ("owner", "ours", "verdict", "code"),
    [
        (None, 7, Verdict.PASS, 0),
        (7, 7, Verdict.PASS, 0),
        (7, None, Verdict.SKIP, 0),
        (8, 7, Verdict.FAIL, WalRefused.exit_code),
        (REFUSED, 7, Verdict.FAIL, REFUSED.exit_code),
    ],
)
def test_a_repository_has_to_be_this_database_clusters(
    owner: int | AgentError | None, ours: int | None, verdict: Verdict, code: int
) -> None:
    finding = identity_finding(owner, ours)
    assert (finding.verdict, finding.exit_code) == (verdict, code)


def test_another_encryption_key_fails_with_its_own_code() -> None:
    assert key_finding(WrongKey("another key"), encrypts=True, compression="zstd").exit_code == WrongKey.exit_code
    assert key_finding(None, encrypts=False, compression="zstd").verdict is Verdict.PASS


@given(
    sampled_from(Operation), sampled_from([REFUSED, RepositoryUnavailable("down"), RepositoryCorrupt("other bytes")])
)
def test_an_operation_that_fails_is_a_failure_unless_the_agent_can_do_without_it(
    operation: Operation, problem: AgentError
) -> None:
    trials = dict.fromkeys(Operation, Trial(0.01)) | {operation: Trial(problem=problem)}
    found = {each.subject: each for each in store_findings(StoreFacts(trials, (), None))}
    spared = operation in (Operation.DELETE, Operation.CONDITIONAL_PUT)
    assert found[operation].verdict is (Verdict.WARN if spared else Verdict.FAIL)
    assert found[operation].text == problem.message
    assert verdicts([each for name, each in found.items() if name != operation]) == {Verdict.PASS}


def test_what_was_not_tried_never_passes_and_what_was_left_behind_is_named() -> None:
    *trials, left = store_findings(StoreFacts(dict.fromkeys(Operation, Trial()), ("pitr_probe_1",), None))
    assert verdicts(trials) == {Verdict.SKIP}
    assert (left.verdict, "pitr_probe_1" in left.text) == (Verdict.WARN, True)


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(0, Verdict.PASS), (-299, Verdict.PASS), (301, Verdict.WARN), (-301, Verdict.WARN)]
)
def test_a_clock_that_is_more_than_five_minutes_off_is_told(seconds: int, verdict: Verdict) -> None:
    facts = StoreFacts({}, (), timedelta(seconds=seconds))
    assert [each.verdict for each in store_findings(facts)] == [verdict]


def rule(prefix: str = "", *, removes: bool = False, archives: bool = False, versions: bool = False) -> LifecycleRule:
    return LifecycleRule("r", prefix, removes, archives, versions, "after 30 days")


@pytest.mark.parametrize(
    ("lifecycle", "verdict"),
    [
        (rule("", removes=True), Verdict.WARN),
        (rule("db/wal_005/", removes=True), Verdict.WARN),
        (rule("d", archives=True), Verdict.WARN),
        (rule("other/", removes=True), Verdict.PASS),
        (rule("", versions=True), Verdict.PASS),
    ],
)
def test_a_lifecycle_rule_that_removes_or_archives_what_is_ours_is_told(
    lifecycle: LifecycleRule, verdict: Verdict
) -> None:
    assert of_bucket(replace(BUCKET, lifecycle=[lifecycle]))["lifecycle"].verdict is verdict


@given(builds(rule, text(max_size=6), removes=sampled_from([True])))
def test_a_rule_is_ours_if_one_of_the_prefixes_begins_with_the_other(lifecycle: LifecycleRule) -> None:
    touches = any(("db/" + key).startswith(lifecycle.prefix) for key in ("", "basebackups_005/x", lifecycle.prefix[3:]))
    verdict = of_bucket(replace(BUCKET, lifecycle=[lifecycle]))["lifecycle"].verdict
    assert (verdict is Verdict.WARN) == touches


def test_old_versions_that_nobody_removes_are_told() -> None:
    versioned = replace(BUCKET, versioning="Enabled")
    assert of_bucket(versioned)["versioning"].verdict is Verdict.WARN
    assert of_bucket(replace(versioned, lifecycle=[rule(versions=True)]))["versioning"].verdict is Verdict.PASS


def test_what_a_policy_hides_is_skipped_with_the_permission_to_see_it() -> None:
    found = of_bucket(replace(BUCKET, versioning=REFUSED, lock=REFUSED, lifecycle=REFUSED))
    assert [found[name].verdict for name in ("versioning", "object lock", "lifecycle")] == [Verdict.SKIP] * 3
    assert "s3:GetLifecycleConfiguration" in found["lifecycle"].fix


def test_a_store_that_lacks_an_ability_is_told_and_one_that_refuses_to_be_tried_is_skipped() -> None:
    found = of_bucket(replace(BUCKET, reads_ranges=False, compares_checksums=REFUSED, is_conditional=False))
    tried = [found[name].verdict for name in ("ranged GET", "checksums", "If-None-Match")]
    assert tried == [Verdict.WARN, Verdict.SKIP, Verdict.WARN]
    assert of_bucket(BUCKET, is_writable=False)["checksums"].verdict is Verdict.SKIP


@pytest.mark.parametrize(("expires_at", "are_renewed"), [(None, True), (None, False), (NOW, True)])
def test_credentials_that_end_and_are_not_renewed_are_told(expires_at: datetime | None, are_renewed: bool) -> None:
    found = of_bucket(replace(BUCKET, credentials=Credentials("here", expires_at, are_renewed)))["credentials"]
    assert found.verdict is (Verdict.PASS if are_renewed else Verdict.WARN)
    assert ("until 2026-11-23 08:00:00 UTC" in found.text) == (expires_at is not None)


def test_what_the_agent_finds_wrong_is_passed_on() -> None:
    running = RunningAgent("1.0", NOW, 3, (("There is no base backup.", "pitr backup now"),))
    up, wrong = agent_findings(running)
    assert (up.verdict, up.text) == (Verdict.PASS, "1.0, since 2026-11-23 08:00:00 UTC; 3 WAL files wait")
    assert (wrong.verdict, wrong.text, wrong.fix) == (Verdict.WARN, "There is no base backup.", "pitr backup now")
    (down,) = agent_findings(AgentUnavailable("no agent answers on /run/pitr/agent.sock"))
    assert down.exit_code == AgentUnavailable.exit_code
