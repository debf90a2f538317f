"""`pitr demo`, as a person runs it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.lab.agent_process import agent_environment
from agent.lab.processes import kill_tree, running_in

SECONDS = 300
COMMAND = (sys.executable, "-P", "-m", "agent", "demo")


@pytest.fixture
def settings(lab_directory: Path, hook_directory: Path) -> Mapping[str, str]:
    """The demo's environment: all it makes lies in `lab_directory`."""
    return {"TMPDIR": str(lab_directory), "PITR_HOOK_DIR": str(hook_directory)}


@contextmanager
def demo(settings: Mapping[str, str], *options: str) -> Iterator["subprocess.Popen[str]"]:
    """Start the demo in a session of its own, as in a terminal of its own."""
    process = subprocess.Popen(
        [*COMMAND, *options],
        env=agent_environment(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            kill_tree(process)


def run_demo(settings: Mapping[str, str], *options: str) -> tuple[int, str]:
    with demo(settings, *options) as process:
        said, _ = process.communicate(timeout=SECONDS)
    return process.returncode, said


def test_the_demo_proves_the_restore_and_leaves_nothing(settings: Mapping[str, str], lab_directory: Path) -> None:
    code, said = run_demo(settings)
    assert code == 0, said
    assert re.search(r"orders +150,000 +gone +150,000 +as before", said), said
    paid = re.search(r"payments +([\d,]+) +([\d,]+) +([\d,]+) +as before", said)
    assert paid, said
    before, damaged, restored = (int(number.replace(",", "")) for number in paid.groups())
    assert before == restored < damaged
    assert "Every proof held" in said
    assert running_in(lab_directory) == []
    assert list(lab_directory.iterdir()) == []


def test_with_keep_everything_runs_on_until_it_is_stopped(settings: Mapping[str, str], lab_directory: Path) -> None:
    code, said = run_demo(settings, "--keep")
    assert code == 0, said
    directory = next(lab_directory.iterdir())
    look = f". {directory}/environment.sh; psql -Atc \"SELECT to_regclass('orders') IS NULL\"; "
    look += f'psql -h {directory}/restored.run -Atc "SELECT count(*) FROM orders"'
    found = subprocess.run(["sh", "-c", look], capture_output=True, text=True, check=True, env={"PATH": os.defpath})
    assert found.stdout.split() == ["t", "150000"]
    subprocess.run(["sh", directory / "stop.sh"], check=True)
    assert running_in(lab_directory) == []
    assert list(lab_directory.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(
    number: signal.Signals, settings: Mapping[str, str], lab_directory: Path
) -> None:
    with demo(settings) as process:
        assert process.stdout is not None
        assert any("PostgreSQL started" in line for line in process.stdout)
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(SECONDS) == 130, rest
    assert "Traceback" not in rest
    assert running_in(lab_directory) == []
    assert list(lab_directory.iterdir()) == []


def test_a_part_that_fails_ends_the_demo_with_the_logs(settings: Mapping[str, str], lab_directory: Path) -> None:
    with demo(settings) as process:
        assert process.stdout is not None
        assert any("PostgreSQL started" in line for line in process.stdout)
        postmaster = next(lab_directory.glob("pitr-demo-*/pgdata/postmaster.pid"))
        os.kill(int(postmaster.read_text().splitlines()[0]), signal.SIGKILL)
        rest = process.stdout.read()
        assert process.wait(SECONDS) == 1
    assert re.search(r"the end of \S+/pgdata.log\n(.*\n)*.*database system is ready", rest), rest
    assert rest.splitlines()[-1].startswith("pitr: ")
    assert "Traceback" not in rest
    assert running_in(lab_directory) == []
    assert list(lab_directory.iterdir()) == []


def test_without_its_programs_the_demo_says_in_one_line_what_to_install(
    settings: Mapping[str, str], tmp_path: Path
) -> None:
    code, said = run_demo({**settings, "PITR_HOOK_DIR": str(tmp_path)})
    assert code == 10
    assert said == f"pitr: there is no pitr-hook in {tmp_path}. Run pip install 'postgres-pitr[demo]'.\n"
