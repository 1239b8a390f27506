"""The files around the code: they parse, and agree with pyproject.toml."""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
YAML_FILES = [
    ROOT / "CITATION.cff",
    ROOT / ".pre-commit-config.yaml",
    *(ROOT / ".github").rglob("*.yml"),
]


def read(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_files_parse(path):
    assert isinstance(read(path), dict)


def test_the_workflow_runs_on_every_python_version_that_the_package_names():
    named = [
        entry.rpartition(" ")[2]
        for entry in PROJECT["classifiers"]
        if entry.startswith("Programming Language :: Python :: 3.")
    ]
    jobs = read(".github/workflows/ci.yml")["jobs"]
    assert jobs["newest"]["strategy"]["matrix"]["python-version"] == named
    (uv,) = (step for step in jobs["oldest"]["steps"] if "setup-uv" in str(step))
    assert uv["with"]["python-version"] == named[0]
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_every_dependency_has_the_lower_bound_that_the_oldest_job_installs():
    extras = PROJECT["optional-dependencies"]
    optional = (*extras["sdp"], *extras["slurm"], *extras["torch"])
    bounded = [*PROJECT["dependencies"], *optional]
    assert not [requirement for requirement in bounded if ">=" not in requirement]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize(
    "page", [p for p in PAGES if _TEST.search(p.read_text())], ids=lambda p: p.name
)
def test_every_test_that_a_page_names_exists(page):
    for path, name in _TEST.findall(page.read_text()):
        tree = ast.parse((ROOT / path).read_text())
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert name in names, f"{path} has no {name}"


def test_every_promise_of_the_readme_names_its_test():
    section = (ROOT / "README.md").read_text().partition("## What a run promises")[2]
    table = section.partition("\n## ")[0].strip().splitlines()[2:]
    assert len(table) > 10
    for line in table:
        _, promise, tests, _ = line.split("|")
        assert promise.strip().endswith((".", ").")) and _TEST.search(tests), line


def test_the_citation_names_the_license_and_the_paper():
    citation = read("CITATION.cff")
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["title"].startswith("DIMAT: Decentralized Iterative Merging")
    assert [author["family-names"] for author in paper["authors"]] == [
        *("Saadati", "Pham", "Saleem", "Waite", "Balu", "Jiang", "Hegde", "Sarkar")
    ]
