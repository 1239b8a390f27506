"""Builds the documentation site into build/site, and fails if a link leads nowhere.

    python -m docs.build

The site is made of the pages and pictures in docs/, of its notebooks, which become
pages, of experiments/RESULTS.md, which becomes the page "All measurements", and of the
lists of options and algorithms, which are written from the records in the code. They
are put together in build/docs, and Zensical (zensical.toml) makes the site of them.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dimat_jax import config
from dimat_jax.algorithms import ALGORITHMS
from docs.from_records import algorithms_table, options_page

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "docs"
RESULTS = ROOT / "experiments" / "RESULTS.md"
PAGES = ROOT / "build" / "docs"
SITE = ROOT / "build" / "site"

# What is copied from docs/ into the site. Python files are not.
_SUFFIXES = (".md", ".ipynb", ".png", ".svg", ".css")
# The places of what is written from records, and the functions that write it.
_WRITTEN = {
    "<!-- all options -->": lambda: options_page(config.ROOT),
    "<!-- all algorithms -->": lambda: algorithms_table(ALGORITHMS),
}


def assemble(pages: Path) -> None:
    """Writes the source of every page, and all pictures, into an empty folder."""
    for source in sorted(SOURCE.rglob("*")):
        if source.suffix not in _SUFFIXES:
            continue
        target = pages / source.relative_to(SOURCE)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            target.write_text(_page(source.read_text(), source.parent))
        elif source.suffix == ".ipynb":
            text = _page(_notebook(source.read_text()), source.parent)
            target.with_suffix(".md").write_text(text)
        else:
            shutil.copyfile(source, target)
    # In its own folder the file names pictures and pages relative to experiments/.
    (pages / "results.md").write_text(RESULTS.read_text().replace("](../docs/", "]("))


def _notebook(content: str) -> str:
    """The cells of a notebook as Markdown, without outputs."""
    parts = []
    for cell in json.loads(content)["cells"]:
        text = "".join(cell["source"])
        is_code = cell["cell_type"] == "code"
        parts.append(f"```python\n{text}\n```" if is_code else text)
    return "\n\n".join(parts) + "\n"


def _page(text: str, folder: Path) -> str:
    """A page of the site, from the text of a page in a folder of docs/."""
    text = re.sub(r"\]\((\S+)\.ipynb\)", r"](\1.md)", text)
    # On a code host the link leads to the file itself, on the site to its page.
    text = re.sub(
        r"\]\(((?:\.\./)*)\.\./experiments/RESULTS\.md", r"](\1results.md", text
    )
    text = re.sub(
        r"!\[[^]]*\]\((\S+\.svg)\)",
        lambda match: _drawing(folder / match[1]),
        text,
    )
    for mark, write in _WRITTEN.items():
        if mark in text:
            text = text.replace(mark, write())
    return text


def _drawing(svg: Path) -> str:
    """A drawing as part of its page, where it has the colours of the page's text.

    The drawing's own style is for code hosts, which show it as a picture.
    """
    return re.sub(r"<style>.*?</style>\s*", "", svg.read_text(), flags=re.DOTALL)


class _Links(HTMLParser):
    """The links of an HTML page, and the anchors that other links may lead to."""

    def __init__(self, html: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name in ("id", "name"):
                self.anchors.add(value)
            elif name in ("href", "src", "data"):
                self.links.append(value)


def dead_links(site: Path) -> Iterator[str]:
    """The links of a built site to files or anchors of the site that do not exist.

    Zensical's strict mode finds dead links between pages, but not pictures and other
    files that are missing.

    Args:
        site: the folder of the site. Links to other sites are not followed.

    Yields:
        a message for each dead link, with the page that it stands on.
    """
    pages = {path.resolve(): _Links(path.read_text()) for path in site.rglob("*.html")}
    for path, page in sorted(pages.items()):
        # The page for addresses that do not exist may be shown under any address.
        if path.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve()
            if not parts.path:
                target = path
            elif target.is_dir():
                target = target / "index.html"
            if not target.is_file():
                yield f"{path.relative_to(site.resolve())}: no file for {link!r}"
            elif target in pages and parts.fragment:
                if unquote(parts.fragment) not in pages[target].anchors | {"__top"}:
                    yield f"{path.relative_to(site.resolve())}: no anchor for {link!r}"


def build(announce: Callable[[str], None] = print) -> int:
    """Builds the site.

    Args:
        announce: is called with a line for each dead link and for the result.

    Returns:
        The exit status: 0 if the site is built and all its links lead somewhere.
    """
    for folder in (PAGES, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    assemble(PAGES)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    finished = subprocess.run(command, cwd=ROOT, check=False)
    if finished.returncode:
        return finished.returncode
    dead = list(dead_links(SITE))
    for message in dead:
        announce(message)
    announce(f"{len(dead)} dead links" if dead else f"built {SITE / 'index.html'}")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(build())
