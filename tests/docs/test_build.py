"""The site is put together from its sources, and dead links are found."""

import pkgutil
import re
import tomllib

import pytest

import dimat_jax
from dimat_jax import reports
from docs import build


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    build.assemble(folder)
    return folder


def test_every_page_is_in_the_navigation_and_the_other_way_round(pages):
    config = tomllib.loads((build.ROOT / "zensical.toml").read_text())

    def linked(entries):
        for entry in entries:
            for target in entry.values():
                if isinstance(target, str):
                    yield target
                else:
                    yield from linked(target)

    written = {str(path.relative_to(pages)) for path in pages.rglob("*.md")}
    assert sorted(linked(config["project"]["nav"])) == sorted(written)


def test_a_notebook_becomes_a_page_that_others_link_to(pages):
    text = (pages / "tutorials" / "quickstart.md").read_text()
    assert text.startswith("# A run in a notebook")
    assert "```python\nresult.figure()\n```" in text
    for page in pages.rglob("*.md"):
        assert ".ipynb)" not in page.read_text(), page
    assert not list(pages.rglob("*.ipynb"))


def test_results_are_a_page_whose_pictures_and_links_are_found(pages):
    text = (pages / "results.md").read_text()
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert "algorithms.png" in targets and "quickstart.md" in targets
    assert all((pages / target).is_file() for target in targets)


def test_links_to_the_results_lead_to_their_page(pages):
    assert "(results.md#every" in (pages / "algorithms.md").read_text()
    assert "(../results.md#one-device" in (pages / "how-to" / "devices.md").read_text()
    for page in pages.rglob("*.md"):
        assert "](../experiments" not in page.read_text(), page


def test_lists_are_written_from_the_records(pages):
    assert "### `merge.stay`" in (pages / "options.md").read_text()
    assert "| `cdsgd` |" in (pages / "algorithms.md").read_text()
    for page in pages.rglob("*.md"):
        assert "<!-- all" not in page.read_text(), page


def test_drawings_are_part_of_their_page(pages):
    text = (pages / "index.md").read_text()
    assert "<svg" in text and "round.svg" not in text
    assert "prefers-color-scheme" not in text  # the site has a switch of its own


def test_every_public_module_has_its_place_in_the_api():
    text = "".join(page.read_text() for page in (build.SOURCE / "api").glob("*.md"))
    shown = re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE)
    modules = pkgutil.walk_packages(dimat_jax.__path__, "dimat_jax.")
    # The bundled configs are files to run and to start from, not functions to call.
    hidden = ("._", "dimat_jax.configs")
    public = [m.name for m in modules if not any(part in m.name for part in hidden)]
    # A class that a module takes from an internal one has a place of its own.
    modules_shown = [name for name in shown if name.rpartition(".")[2].islower()]
    assert sorted(modules_shown) == sorted(public)


def test_the_api_shows_all_names_of_the_reports():
    """Their names are imported at first use, so the site's builder cannot find them."""
    text = (build.SOURCE / "api" / "runs.md").read_text()
    assert sorted(re.findall(r"^ +- (\w+)$", text, re.MULTILINE)) == sorted(
        vars(reports)["__all__"]
    )


def test_dead_links_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">x</h1><a href="sub/#here">a</a><a href="#top">b</a>'
        '<a href="sub/#there">c</a><a href="none/">d</a><img src="none.png">'
        '<a href="https://example.org/none">e</a><a href="#bottom">f</a>'
    )
    (tmp_path / "sub" / "index.html").write_text('<p id="here"><a href="..">up</a>')
    assert list(build.dead_links(tmp_path)) == [
        "index.html: no anchor for 'sub/#there'",
        "index.html: no file for 'none/'",
        "index.html: no file for 'none.png'",
        "index.html: no anchor for '#bottom'",
    ]


def test_a_build_without_dead_links_only(monkeypatch, tmp_path):
    """The exit status is not 0 if a link of the built site leads nowhere."""
    said = []
    monkeypatch.setattr(build, "PAGES", tmp_path / "pages")
    monkeypatch.setattr(build, "SITE", tmp_path / "site")

    def make(command, **options):
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "index.html").write_text('<a href="none/">')
        return type("Finished", (), {"returncode": 0})

    monkeypatch.setattr(build.subprocess, "run", make)
    assert build.build(said.append) == 1
    assert said == ["index.html: no file for 'none/'", "1 dead links"]
