"""The documents say what the code does."""

import re
import tomllib
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from agent import errors, settings
from agent.telemetry.metrics import Metrics
from agent.telemetry.push import DRILL_METRICS, RESTORE_METRICS

DOCS = Path(__file__).parents[2] / "docs"


def test_every_metric_is_documented_and_none_besides() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    declared = {*RESTORE_METRICS, *DRILL_METRICS}
    for family in registry.collect():
        declared.add(f"{family.name}_total" if family.type == "counter" else family.name)
    text = (DOCS / "metrics.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)", " ".join(rows))) == declared


def test_every_setting_that_is_read_is_documented() -> None:
    source = (
        Path(settings.__file__).read_text() + (Path(settings.__file__).parent / "domain/restore_target.py").read_text()
    )
    read = set(re.findall(r'"((?:PITR|WALG|AWS|PG|TARGET)[A-Z0-9_]*|BACKUP_NAME|AUTO_START)"', source))
    older = {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_DEFAULT_REGION"}  # accepted, not advertised
    documented = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (DOCS / "settings.md").read_text()))
    assert read - older <= documented


def test_every_exit_code_is_documented_and_none_besides() -> None:
    codes = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.AgentError)
    }
    rows = re.findall(r"^\| (\d+) \|", (DOCS / "settings.md").read_text(), re.MULTILINE)
    assert {int(code) for code in rows} == codes | {0, 1, 2}


def test_the_drawing_of_the_layers_is_that_of_the_contract() -> None:
    contracts = _project()["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    drawing = (DOCS / "architecture.md").read_text().split("## The layers")[1].split("\n- ")[0]
    drawn = re.findall(r"^ {4}(\w+(?: \| \w+)*)", drawing, re.MULTILINE)
    assert drawn == [layer.replace("agent.", "") for layer in layers]


def test_every_dependency_has_its_reason() -> None:
    project = _project()["project"]
    given = [
        *project["dependencies"],
        *project["optional-dependencies"]["demo"],
        *project["optional-dependencies"]["test"],
    ]
    names = {re.split(r"[\[<>=; ]", each)[0] for each in given} - {"postgres-pitr"}
    reasons = (DOCS / "architecture.md").read_text().split("## Dependencies")[1]
    missing = {name for name in names if name.removeprefix("types-").removesuffix("-s3").lower() not in reasons.lower()}
    assert not missing


def _project() -> dict[str, Any]:
    return tomllib.loads((DOCS.parent / "pyproject.toml").read_text())
