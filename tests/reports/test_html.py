import dataclasses
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from bayesprune import reports
from bayesprune.reports import HistoryPoint
from bayesprune.reports.layers import LayerSize, LayerSNR

pytest.importorskip("matplotlib")

VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects texts and attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.tags, self.attributes = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def network(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def report():
    return reports.report(
        network(8),
        network(4),
        torch.zeros(4, 6),
        evaluate=lambda _: 0.9,
        snr={"0.weight": torch.full((8, 6), 5.0)},
        history=[HistoryPoint(70, 0.8)],
        num_repeats=1,
    )


def test_page_is_well_formed_and_holds_the_numbers(report):
    page = Page(report.to_html())
    for text in ("83", "43", "1.93x fewer", "288.0", "144.0", "90.00 %", "4 / 8", "28 / 56", "5.00"):
        assert text in page.texts
    assert any("torch.utils.flop_counter, FLOPs / 2, batch 4" in text for text in page.texts)
    assert page.tags.count("svg") == 3
    assert page.tags.count("table") == 2


def test_page_needs_nothing_from_outside(report):
    html = report.to_html()
    page = Page(html)
    assert "http" not in html
    assert "@import" not in html
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    links = [value for name, value in page.attributes if name.endswith(("href", "src"))]
    assert all(value.startswith("#") for value in links)


def test_page_is_the_same_each_time(report):
    assert report.to_html() == report.to_html()


def test_tables_of_others_stand_in_page_text_and_json(report):
    evil = "<b>mine</b>"
    extra = reports.ExtraTable(evil, "how it was measured", ("kind", "before"), (("noise", "91.5%"), (evil, "1%")))
    more = dataclasses.replace(report, tables=(extra,))
    page = Page(more.to_html())
    assert page.tags.count("table") == 3
    assert {"how it was measured", "noise", "91.5%"} <= set(page.texts)
    assert page.texts.count(evil) == 2
    assert "noise" in str(more)
    assert "91.5%" in str(more)
    assert reports.Report.from_json(more.to_json()) == more


def test_texts_from_outside_are_escaped(report):
    evil = "<script>alert('$1^2$')</script>&amp;"
    layers = tuple(dataclasses.replace(layer, name=evil[:30]) for layer in report.before.layers[:1])
    before = dataclasses.replace(report.before, label=evil, layers=layers)
    snr = tuple(dataclasses.replace(layer, name=evil[:30]) for layer in report.snr)
    strange = dataclasses.replace(report, title=evil, before=before, snr=snr, notes=(evil,), versions={evil: evil})
    html = strange.to_html()
    page = Page(html)
    assert "<script" not in html
    assert page.texts.count(evil) >= 4  # title twice, label in table and plot, note
    assert page.texts.count(evil[:30]) >= 3  # table and two plots


def test_a_hundred_layers_are_all_labelled(report):
    names = [f"stages.{i // 10}.blocks.{i % 10}.conv" for i in range(100)]
    sizes = tuple(LayerSize(name, "Conv2d", 64, 640, 640, 6400) for name in names)
    snr = tuple(LayerSNR(name, 1.0, 0.5, (1,) * 24) for name in names)
    many = dataclasses.replace(
        report,
        before=dataclasses.replace(report.before, layers=sizes),
        after=dataclasses.replace(report.after, layers=sizes),
        snr=snr,
    )
    page = Page(many.to_html())
    assert all(page.texts.count(name) == 3 for name in names)  # two plots and the table


def test_page_without_accuracy_snr_or_layers_says_so():
    measured = [reports.measure(nn.ReLU(), torch.zeros(1, 2), label=label, num_repeats=0) for label in ("a", "b")]
    page = Page(reports.report(*measured).to_html())
    assert "svg" not in page.tags
    assert "No accuracy was measured; pass evaluate=... to measure it." in page.texts
    assert "The models have no layers." in page.texts


def test_long_names_are_cut_from_the_left_in_plots_only(report):
    name = "encoder." * 6 + "projection"
    sizes = (dataclasses.replace(report.before.layers[0], name=name),)
    report = dataclasses.replace(report, before=dataclasses.replace(report.before, layers=sizes))
    texts = Page(report.to_html()).texts
    assert name in texts
    assert f"…{name[-29:]}" in texts


def test_wide_ranges_of_sizes_are_plotted_on_a_logarithmic_axis(report):
    small = dataclasses.replace(report, history=(HistoryPoint(100, 0.5), HistoryPoint(1_000_000, 0.95)))
    texts = Page(small.to_html()).texts
    assert {"100", "1 k", "10 k", "100 k", "1 M"} <= set(texts)


def test_save_writes_three_files_and_leaves_nothing_else(report, tmp_path):
    target = tmp_path / "new" / "reports"
    report.save(target)
    report.save(target)
    assert sorted(path.name for path in target.iterdir()) == ["report.csv", "report.html", "report.json"]
    assert reports.Report.from_json((target / "report.json").read_text(encoding="utf-8")) == report
    assert (target / "report.html").read_text(encoding="utf-8") == report.to_html()
    assert (target / "report.csv").read_text(encoding="utf-8") == report.to_csv()


def test_a_write_that_fails_leaves_no_temporary_file(report, tmp_path):
    (tmp_path / "report.csv").mkdir()
    with pytest.raises(OSError, match=r"report\.csv"):
        report.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.csv", "report.json"]


def test_missing_matplotlib_is_named_before_anything_is_written(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "bayesprune\[report\]"'):
        report.save(tmp_path / "reports")
    assert not (tmp_path / "reports").exists()
    assert "83" in str(report)
