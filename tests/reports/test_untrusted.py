"""Reports and directories of others are shown as text: nothing in them moves the cursor, is markup, or ends badly."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bayesprune as bp
from bayesprune import reports
from bayesprune.errors import StorageError
from bayesprune.foundation.text import printable
from bayesprune.reports import Report
from bayesprune.storage.digests import tensor_header
from tests.commands import run
from tests.storage.sealing import rewrite

WORDS = ["[/x]", "[bold red]b", "\x1b[2J\x1b]0;title\x07", "a\rb\nc", "\u202egnp", "\ud800", "x" * 5000, "\\", '"><b>&']


@pytest.fixture(scope="module")
def document():
    old, new = (nn.Sequential(nn.Linear(4, size), nn.Linear(size, 2)) for size in (6, 3))
    snr = {"0.weight": torch.full((6, 4), 2.0)}
    found = reports.report(old, new, torch.zeros(2, 4), snr=snr, evaluate=lambda _: 0.5, num_repeats=0)
    return json.loads(found.to_json())


def changed(document, place, value):
    copy = json.loads(json.dumps(document))
    *path, last = place
    node = copy
    for key in path:
        node = node[key]
    node[last] = value
    return json.dumps(copy)


@pytest.mark.parametrize("word", WORDS, ids=ascii)
def test_printable(word):
    shown = printable(word)
    assert shown.isprintable()
    assert len(shown) <= 210
    assert shown == word or not word.isprintable() or len(word) > 200


@pytest.mark.parametrize("word", WORDS, ids=ascii)
@pytest.mark.parametrize(
    "place",
    [("title",), ("before", "label"), ("metric", "name"), ("notes",), ("before", "layers", 0, "name"), ("versions",)],
    ids=str,
)
def test_words_of_a_report_are_text(document, tmp_path, capsys, place, word):
    value = {"notes": [word], "versions": {word: word}}.get(place[-1], word)
    (tmp_path / "report.json").write_text(changed(document, place, value))
    code, out, err = run(capsys, "report", str(tmp_path))
    assert (code, err) == (0, "")
    assert all(letter.isprintable() for letter in out.replace("\n", ""))
    assert "[/x]" in out or word != "[/x]" or place == ("versions",)


def test_words_of_a_report_are_no_elements_of_its_page(document):
    pytest.importorskip("matplotlib")
    for place in (("metric", "name"), ("title",), ("before", "layers", 0, "name")):
        page = Report.from_json(changed(document, place, '"><script>\x1b[2Jx\\1')).to_html()
        assert "<script" not in page
        assert all(letter.isprintable() for letter in page.replace("\n", ""))
        assert not re.search(r'aria-label="[^"]*"[^ ]', page)


NUMBERS = [10**30, -(10**400), 1e308, 5e-324, 1e101]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "place",
    [("before", "macs"), ("before", "accuracy"), ("snr", 0, "median"), ("after", "parameters"), ("metric", "name")],
    ids=str,
)
def test_huge_numbers_are_refused_or_short(document, tmp_path, capsys, place, number):
    (tmp_path / "report.json").write_text(changed(document, place, number))
    code, out, err = run(capsys, "report", str(tmp_path))
    assert code in (0, 1)
    assert "Traceback" not in err
    assert err.startswith("error: this is no report that can be read: report.") or code == 0
    assert len(out) + len(err) < 6000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
        ("[" + "[]," * 600_000 + "1]", "values; expected at most"),
        ('{"schema_version": 1' + "0" * 5000 + "}", "is not valid JSON"),
        ('{"schema_version": "' + "x" * 5000 + '"}', "expected 1"),
        ("\x1b[2J", "is not valid JSON"),
        ("[1]", "schema_version is None"),
    ],
    ids=["deep list", "deep object", "wide", "long number", "long text", "escape", "list"],
)
def test_what_is_no_report_is_one_sentence(tmp_path, capsys, text, said):
    (tmp_path / "report.json").write_text(text)
    code, out, err = run(capsys, "report", str(tmp_path))
    assert code == 1
    assert said in " ".join((out + err).split())
    assert len(out) + len(err) < 2000
    with pytest.raises(StorageError, match=re.escape(said)):
        Report.from_json(text)


@pytest.mark.parametrize("word", WORDS, ids=ascii)
def test_inspect_shows_names_as_text(tmp_path, capsys, word):
    bp.save(nn.Linear(2, 2), tmp_path)
    if word != "\ud800":  # no name of a file of tensors
        rename(tmp_path, "weight", word)

    def change(record):
        record["versions"] = {"torch": word}
        record["base"] = {"library": word, "name": word, "args": {}, "config": {}}

    rewrite(tmp_path / "bayesprune.json", change)
    code, out, err = run(capsys, "inspect", str(tmp_path))
    assert (code, err) == (0, "")
    assert all(letter.isprintable() for letter in out.replace("\n", ""))


@pytest.mark.parametrize("word", ["[/x]", "\x1b[2J"])
def test_errors_show_names_as_text(tmp_path, capsys, word):
    bp.save(nn.Linear(2, 2), tmp_path)
    rewrite(tmp_path / "bayesprune.json", lambda record: record["spec"]["shapes"].update({word: [1]}))
    code, out, err = run(capsys, "inspect", str(tmp_path))
    assert (code, out) == (1, "")
    assert printable(word) in err
    assert all(letter.isprintable() for letter in err.replace("\n", ""))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.bool])
def test_inspect_counts_values_of_any_dtype(tmp_path, capsys, dtype):
    module = nn.Module()
    module.register_buffer("x", torch.tensor([0.0, 1.0, 1.0, 0.0]).to(dtype))
    bp.save(module, tmp_path)
    code, out, _ = run(capsys, "inspect", str(tmp_path))
    assert code == 0
    assert "4 values, 2 of them not zero" in out


def rename(directory, old, new):
    """Gives a tensor of a saved directory another name, with digests that fit."""
    path = directory / "model.safetensors"
    save_id = json.loads((directory / "bayesprune.json").read_text())["save_id"]
    tensors = {new if name == old else name: tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"save_id": save_id, **tensor_header(tensors)})

    def change(record):
        record["spec"]["shapes"] = {new if name == old else name: v for name, v in record["spec"]["shapes"].items()}

    rewrite(directory / "bayesprune.json", change)
