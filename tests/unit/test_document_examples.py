"""The examples in the documents work: commands, settings, metrics, paths, links and the lines that patch manifests."""

import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from agent import errors, settings
from agent.cli.main import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RUNBOOK = ROOT / "docs" / "runbook.md"

_COMMAND = re.compile(r"(?<![\w./:-])pitr (?=[a-z-])([^`|;()#\n>]*)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SETTING = re.compile(r"\b(?:PITR|TARGET)_[A-Z][A-Z_]*[A-Z]\b")

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def code_of(text: str) -> str:
    """Return what stands in code blocks and between backticks, a piece a line."""
    blocks = re.findall(r"^ {4}.*$", re.sub(r"\\\n", " ", text), re.MULTILINE)
    return "\n".join(blocks + re.findall(r"`([^`\n]+)`", text))


def anchors_of(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def unknown_part_of(line: str) -> str | None:
    """Return the first word of `pitr LINE` that the command does not know, or None."""
    command: Any = typer.main.get_command(app)
    for word in shlex.split(line.replace("'", "")):
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        if word.startswith("-"):
            if word.split("=")[0] not in options | {"--help", "-h"}:
                return word
        elif commands := getattr(command, "commands", {}):
            if word not in commands:
                return word
            command = commands[word]
    return None


@every_document
def test_every_command_exists_with_its_options(document: Path) -> None:
    for line in _COMMAND.findall(code_of(document.read_text())):
        for each in line.strip().split("|"):
            assert unknown_part_of(each.split(" (")[0]) is None, f"pitr {line}"


@every_document
def test_every_setting_named_exists(document: Path) -> None:
    known = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (ROOT / "docs" / "settings.md").read_text()))
    source = Path(settings.__file__).read_text() + (ROOT / "agent" / "domain" / "restore_target.py").read_text()
    source += "".join(path.read_text() for path in (ROOT / "hooks").glob("*.c"))
    for name in set(_SETTING.findall(document.read_text())) - {"TARGET_"}:
        assert name in known, f"{name} is not in settings.md"
        assert f'"{name}"' in source, f"{name} is read nowhere"


@every_document
def test_every_metric_named_is_one_of_metrics_md(document: Path) -> None:
    """The first column there is that of the code: see test_documents."""
    rows = [row.split("|")[1] for row in (ROOT / "docs" / "metrics.md").read_text().splitlines() if "| `" in row]
    known = set(re.findall(r"`(\w+)", " ".join(rows))) | {"pitr_restore", "pitr_drill"}  # jobs of the Pushgateway
    for name in re.findall(r"`((?:pitr|postgres_base_backup)_\w+?)(?:\{[^`]*)?`", document.read_text()):
        assert name in known, name


@every_document
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in _LINK.findall(document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


@every_document
def test_every_file_named_exists(document: Path) -> None:
    for name in re.findall(r"\b(?:k8s|docs|agent|hooks|bench|tests)/[\w./-]*\w", code_of(document.read_text())):
        assert (ROOT / name).exists() or name.startswith("k8s/overlays/mine"), name


def test_the_runbook_says_what_to_do_about_every_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    known = {kind.exit_code for kind in kinds if issubclass(kind, errors.AgentError)}
    rows = re.findall(r"^\| (\d+) \| .+ \| .+ \| .*\|$", RUNBOOK.read_text(), re.MULTILINE)
    assert {int(row) for row in rows} >= known | {2}


def yq_lines() -> list[str]:
    """Return the documents' lines that patch a file with yq, without what follows the pipe."""
    text = "\n".join(re.sub(r"\\\n", " ", document.read_text()) for document in DOCUMENTS)
    return [" ".join(found.split("\n")) for found in re.findall(r"^ {4}(yq '[^']+'\s+k8s/\S+)", text, re.MULTILINE)]


@pytest.mark.skipif(shutil.which("yq") is None, reason="yq is not installed")
@pytest.mark.parametrize("line", yq_lines())
def test_every_line_that_patches_a_manifest_makes_a_valid_one(line: str) -> None:
    patched = subprocess.run(shlex.split(line), cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (manifest,) = yaml.safe_load_all(patched)
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    pod: dict[str, Any] = manifest["spec"].get("template", manifest)["spec"]
    (container,) = pod["containers"]
    if ".image = " in line:
        assert container["image"] == "registry.example.com/postgres-pitr:0.1.0"
    if "postgres-data-restored" in line:
        assert [each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if each["name"] == "data"] == [
            "postgres-data-restored"
        ]
    names = [each["name"] for each in container.get("env", [])]
    assert len(names) == len(set(names))
    if 'select(.name == "TARGET_TIME")' in line:
        assert "2026-11-22T14:29:59Z" in [each.get("value") for each in container["env"]]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_overlay_of_the_runbook_is_one(tmp_path: Path) -> None:
    text = RUNBOOK.read_text().split("    # k8s/overlays/mine/kustomization.yaml\n")[1].split("\n\n")[0]
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    mine = tmp_path / "k8s" / "overlays" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(textwrap.dedent(text))
    rendered = subprocess.run(["kubectl", "kustomize", str(mine)], check=True, capture_output=True, text=True).stdout
    documents = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(rendered)}
    pod = documents["StatefulSet", "postgres"]["spec"]["template"]["spec"]
    images = {each["image"] for each in (*pod["initContainers"], *pod["containers"])}
    assert images == {"registry.example.com/postgres-pitr:0.1.0"}
    assert documents["ConfigMap", "postgres-pitr"]["data"]["WALG_S3_PREFIX"] == "s3://my-bucket/my-cluster"


def test_the_documents_patch_manifests() -> None:
    assert len(yq_lines()) >= 3
