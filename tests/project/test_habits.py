"""What GitHub, PyPI, pre-commit and citing tools read says what the repository does: sessions, versions, rights."""

import json
import re
from pathlib import Path

import pytest
import yaml

import sam_split

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NOXFILE = (ROOT / "noxfile.py").read_text(encoding="utf-8")
SESSIONS = set(re.findall(r"^@nox\.session.*\ndef (\w+)\(session\):", NOXFILE, re.MULTILINE))
# May write: what publishes the site and the package, each in a job of its own.
MAY_WRITE = {"docs.yml": {"pages", "id-token"}, "release.yml": {"id-token"}}


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def steps_of(workflow):
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def test_there_is_a_workflow_for_each_occasion():
    on = {path.name: set(read(path)[True]) for path in WORKFLOWS}  # YAML reads the key `on` as true
    assert {"push", "pull_request"} <= on["check.yml"]
    assert "schedule" in on["full.yml"]
    assert on["release.yml"] == {"release"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_sessions_that_exist_and_nothing_else(path):
    workflow = read(path)
    named = []
    for job in workflow["jobs"].values():
        sessions = job.get("strategy", {}).get("matrix", {}).get("session", [])
        named += sessions if isinstance(sessions, list) else []
    for step in steps_of(workflow):
        if "run" in step:
            assert ".ci/run" in step["run"]
            named += re.findall(r"-s (\w+)", step["run"])
            named += step.get("env", {}).get("BESIDES", "").split()
    assert set(named) <= SESSIONS
    assert named or not any("run" in step for step in steps_of(workflow))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_the_least_rights_pinned_actions_and_an_end(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    rights = {name for job in workflow["jobs"].values() for name in job.get("permissions", {})}
    assert rights == MAY_WRITE.get(path.name, set())
    assert all("uses" in job or job["timeout-minutes"] <= 180 for job in workflow["jobs"].values())
    for step in steps_of(workflow):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+|[0-9a-f]{40})", step["uses"])
            if step["uses"].startswith("actions/checkout"):
                assert step["with"] == {"persist-credentials": False}
        assert "${{ github." not in step.get("run", ""), "a tag or a title would be run as a command"


def test_every_session_is_run_at_night_but_those_for_people():
    """The default ones come from nox itself, as JSON; the others are named."""
    (step,) = [step for step in steps_of(read(".github/workflows/full.yml")) if step.get("id") == "list"]
    assert "--list --json" in step["run"]
    lists = re.findall(r"^nox\.options\.sessions \+?= (\[.*\])$", NOXFILE, re.MULTILINE)
    default = {name for names in lists for name in json.loads(names)}
    beside = set(step["env"]["BESIDES"].split())
    assert not default & beside, "those would run twice"
    assert SESSIONS - default - beside == {"quick", "coverage", "mutants", "dist", "across_versions"}


def test_pre_commit_has_the_ruff_of_the_lint_session():
    (hooks,) = [repo for repo in read(".pre-commit-config.yaml")["repos"] if "ruff" in repo["repo"]]
    (pinned,) = re.findall(r'"ruff~=([\d.]+)"', NOXFILE)
    (in_test,) = re.findall(r'"ruff~=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert hooks["rev"].removeprefix("v").split(".")[:2] == pinned.split(".")[:2] == in_test.split(".")[:2]
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]


def test_citation_is_complete_and_of_this_version():
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation), "what the format demands"
    assert citation["version"] == sam_split.__version__
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["title"] == "Segment Anything"
    assert "2304.02643" in json.dumps(paper)


@pytest.mark.parametrize("name", ["ISSUE_TEMPLATE/bug.yml", "ISSUE_TEMPLATE/idea.yml"])
def test_issue_forms_ask_for_the_environment(name):
    form = read(f".github/{name}")
    assert {"name", "description", "body"} <= set(form)
    fields = {field["id"]: field for field in form["body"]}
    assert "sam-split env" in fields["env"]["attributes"]["description"]
    assert "sam-split env" in (ROOT / ".github" / "pull_request_template.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["sam_split", "conversion", "hub_card"])
def test_packages_are_marked_as_typed(package):
    """The wheel takes whole folders; `tests/newcomer.py` looks for the marker in what was installed."""
    assert (ROOT / package / "py.typed").read_bytes() == b""
    packages = re.findall(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert package in json.loads(packages[0])
