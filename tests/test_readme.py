"""The README's examples run, and the files that it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_run(example):
    exec(compile(example, "README.md", "exec"), {})


def test_the_files_it_names_exist():
    named = set(re.findall(r"(?:configs|experiments|docs|tests)/[\w/]+\.\w+", README))
    assert "configs/quickstart.py" in named
    missing = [path for path in sorted(named) if not (ROOT / path).exists()]
    assert not missing
