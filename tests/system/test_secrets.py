"""No secret is shown: not in a log, on a page, in a metric, an error or a process list, whatever goes wrong."""

import asyncio
import subprocess
from collections.abc import Mapping
from pathlib import Path

from agent.lab.agent_process import run_pitr
from agent.lab.seaweedfs import SeaweedServer
from tests.support.stack import BUCKET, MakeStack
from tests.support.until import until

KEY = "canary-of-the-encryption-key-1"
SECRETS = {"PGPASSWORD": "canary-of-postgresql", "WALG_LIBSODIUM_KEY": KEY}
CONNINFO = "host=127.0.0.1 user=replicator password=canary-of-the-primary"


def process_list() -> str:
    """Return the command line of every process."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:  # it has ended
            continue
    return "\n".join(lines)


async def test_no_secret_is_shown_whatever_goes_wrong(
    make_stack: MakeStack, s3_server_of_its_own: SeaweedServer, lab_directory: Path
) -> None:
    repository = {**s3_server_of_its_own.environment(BUCKET, "secrets"), **SECRETS}
    stack = await asyncio.to_thread(make_stack, repository=repository, settings={"PITR_LOG_LEVEL": "debug"})
    told: list[str] = []

    async def pitr(*arguments: str, code: int, **changed: str) -> None:
        settings: Mapping[str, str] = {**stack.agent.settings, **changed}
        done: subprocess.CompletedProcess[str] = await asyncio.to_thread(run_pitr, *arguments, settings=settings)
        assert done.returncode == code, done.stdout + done.stderr
        told.extend((done.stdout, done.stderr))

    wrong, empty = "canary-that-is-wrong-0123456789", str(lab_directory / "restored")
    taking = asyncio.create_task(pitr("backup", "now", code=0))
    while not taking.done():
        told.append(process_list())
        await asyncio.sleep(0.1)
    await taking
    await pitr("window", code=0)
    await pitr("restore", "--plan", code=23, WALG_LIBSODIUM_KEY=wrong)
    await pitr("window", code=21, AWS_SECRET_ACCESS_KEY=wrong)
    await pitr("window", code=10, WALG_LIBSODIUM_KEY="canary-too-short")
    await pitr("window", code=10, AWS_ENDPOINT="http://admin:canary-of-the-endpoint@127.0.0.1:1")
    await pitr("window", code=10, PITR_PUSHGATEWAY="http://admin:canary-of-the-gateway@127.0.0.1:1")
    as_standby = {"PGDATA": empty, "PITR_RESTORE_AS": "standby", "PITR_HOOK_DIR": str(stack.hooks)}
    await pitr("restore", code=10, **as_standby, PITR_PRIMARY_CONNINFO=f"{CONNINFO} and more")
    await pitr("restore", code=0, **as_standby, PITR_PRIMARY_CONNINFO=CONNINFO)
    await pitr("check", "--no-switch", "--json", code=21, AWS_SECRET_ACCESS_KEY=wrong)
    await asyncio.to_thread(s3_server_of_its_own.stop)
    stack.cluster.switch_wal()
    await until(lambda: "pitr_repository_failing_seconds 0.0" not in stack.agent.get("/metrics")[1], what="an outage")
    await pitr("window", code=20)
    told.extend(stack.agent.get(path)[1] for path in ("/", "/metrics", "/status.json"))
    told.extend((stack.agent.log_text(), stack.cluster.log_text(), process_list()))
    secrets = (s3_server_of_its_own.secret_key, "canary")
    shown = [line for text in told for line in text.splitlines() if any(secret in line for secret in secrets)]
    assert not shown
