"""Tests the page of a report, and its tables as LaTeX."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dimat_jax import reports
from dimat_jax.reports import _curves, _looks, _page, _page_figures
from tests.reports.made_up import add_to_rows, by_class, write_run
from tests.reports.test_figures import by_agent


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, and the cells of tables."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self._in_code = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_code = tag in ("script", "style")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self._in_code = False

    def handle_data(self, data):
        if self._in_code:
            return
        self.texts.append(data)
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data

    def count(self, tag: str, **attributes: str) -> int:
        return sum(
            found == tag and attributes.items() <= values.items()
            for found, values in self.tags
        )


def make_runs(folder: Path, n_lines: int = 2, n_seeds: int = 2) -> None:
    for number in range(n_lines):
        for seed in range(n_seeds):
            run = folder / f"{number}-{seed}"
            write_run(
                run,
                algorithm="wa",
                mixing=f"rule{number}",
                seed=seed,
                accuracy=0.4 + seed / 10,
                sent={"params": 1_000_000},
                partition=by_class([3, 1], [0, 4]),
            )


def written(folder: Path) -> Page:
    reports.write([folder], folder / "report")
    return Page((folder / "report" / "report.html").read_text(encoding="utf-8"))


def test_the_page_needs_no_other_file_and_no_network(tmp_path):
    make_runs(tmp_path)
    page = written(tmp_path)
    loading = ("src", "href", "data", "action", "srcset", "poster")
    for tag, attributes in page.tags:
        for name in loading:
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, name, value)
    assert not page.count("link") and not page.count("iframe")
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "Bokeh" in text and len(text) > 1_000_000  # the library is inside
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert str(tmp_path / "0-0") not in text  # the colleague has no use for our paths


def test_the_page_has_all_tables_of_the_report_and_their_columns_can_be_sorted(
    tmp_path,
):
    make_runs(tmp_path, n_lines=3)
    (tmp_path / "2-1" / "metrics.jsonl").write_text("")
    page = written(tmp_path)
    tables = reports.tables(reports.load(tmp_path))
    assert len(page.tables) == len(tables) >= 4
    n_columns = sum(len(table.reset_index().columns) for table in tables.values())
    assert page.count("button", type="button") >= n_columns
    for shown, (title, table) in zip(page.tables, tables.items(), strict=True):
        flat = table.reset_index()
        assert shown[0] == list(map(str, flat.columns))
        assert len(shown) == 1 + len(flat)
        assert title in page.texts
    overview = page.tables[1]
    column = overview[0].index("trained (last round)")
    assert overview[1][column] == "46.00 ± 7.07 (n=2)"
    assert overview[3][column] == "41.00 (n=1 of 2)"
    assert page.tables[0][1][1] == "unfinished"
    assert any("sample deviations" in text for text in page.texts)


@pytest.mark.every_nth(3)
@pytest.mark.parametrize("n_lines", [1, 9, 40])
def test_every_line_can_be_hidden_and_has_a_figure_for_each_measure_and_axis(
    tmp_path, n_lines
):
    make_runs(tmp_path, n_lines=n_lines, n_seeds=1)
    for number in range(n_lines):
        add_to_rows(
            tmp_path / f"{number}-0",
            test_loss_mean=1.5,
            consensus_distance=0.5,
            test_disagreement=0.25,
            test_accuracy_by_class=by_agent,
        )
    page = Page(_page.page(reports.load(tmp_path)))
    assert page.count("input", type="checkbox") == n_lines
    assert page.count("input", type="radio") == 3
    for axis in ("rounds", "bytes", "seconds"):
        assert page.count("div", **{"data-axis": axis, "class": "plots"}) == 4
    for heading in (
        "Test accuracy (%)",
        "Test loss (nats)",
        "Consensus distance",
        "Disagreement of the agents (%)",
        "The agents, one by one",
        "Accuracy by class and agent",
        "Partitions",
    ):
        assert heading in page.texts
    places = sum("data-root-id" in values for _, values in page.tags)
    # Curves: four measures over three axes. Agents and classes: one of each line, for
    # classes two, of which 24 at most are on the page. And one partition.
    assert places == 4 * 3 + min(n_lines, 24) + min(2 * n_lines, 24) + 1
    said = any("These are 24 of" in text for text in page.texts)
    assert said == (2 * n_lines > 24)


def test_all_parts_of_a_line_pass_the_filter_that_hides_it(tmp_path):
    make_runs(tmp_path, n_lines=3)
    chart = _curves.chart(reports.load(tmp_path))
    (plot,) = _page_figures.curve_plots(chart, bands=True)
    filters = [renderer.view.filter for renderer in plot.renderers]
    assert {found.name for found in filters} == {_page_figures.LINE_FILTER}
    assert len(filters) == 4  # bands, lighter curves, curves, marks
    for found, renderer in zip(filters, plot.renderers, strict=True):
        assert set(found.tags) == {0, 1, 2}
        columns = renderer.data_source.data
        assert {len(column) for column in columns.values()} == {len(found.tags)}
        colors = [_looks.look(number).color for number in found.tags]
        assert columns["color"] == colors


def test_who_sends_nothing_is_flat_over_the_bytes_of_the_others(tmp_path):
    write_run(tmp_path / "wa", algorithm="wa", sent={"params": 3_000_000})
    write_run(tmp_path / "local", algorithm="local", accuracy=0.7, sent={})
    chart = _curves.chart(reports.load(tmp_path), against="bytes")
    (plot,) = _page_figures.curve_plots(chart, bands=False)
    curves = plot.renderers[1].data_source.data
    assert curves["xs"] == [[3, 6], [3, 6]]
    assert curves["ys"][1] == pytest.approx([71, 71])
    assert curves["dash"] == ["solid", "dashed"]


def test_names_cannot_break_the_page_or_the_latex(tmp_path):
    for rule in ("<script>alert(1)</script>", "100%_&_{x}"):
        write_run(tmp_path / str(len(rule)), algorithm="wa", mixing=rule)
    page = written(tmp_path)
    cells = [cell for table in page.tables for row in table for cell in row]
    assert "<script>alert(1)</script>" in cells and "100%_&_{x}" in cells
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    body = text[: text.index("Bokeh")]
    assert "<script>alert" not in body
    tex = (tmp_path / "report" / "report.tex").read_text(encoding="utf-8")
    assert r"100\%\_\&\_\{x\}" in tex


def test_every_table_is_also_latex(tmp_path):
    make_runs(tmp_path)
    written(tmp_path)
    tex = (tmp_path / "report" / "report.tex").read_text(encoding="utf-8")
    tables = reports.tables(reports.load(tmp_path))
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == len(tables)
    assert r"46.00 $\pm$ 7.07 (n=2)" in tex and "±" not in re.sub("%.*", "", tex)
    for columns, body in re.findall(
        r"\\begin\{tabular\}\{(l+)\}(.*?)\\end", tex, flags=re.DOTALL
    ):
        for row in body.splitlines():
            if row.endswith(r"\\"):
                assert row.replace(r"\&", "").count("&") == len(columns) - 1
