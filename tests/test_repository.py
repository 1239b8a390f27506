"""The files around the code: they parse, and agree with pyproject.toml."""

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


def test_the_citation_names_the_license_and_the_paper():
    citation = read("CITATION.cff")
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["title"].startswith("DIMAT: Decentralized Iterative Merging")
    assert [author["family-names"] for author in paper["authors"]] == [
        *("Saadati", "Pham", "Saleem", "Waite", "Balu", "Jiang", "Hegde", "Sarkar")
    ]
