import csv
import dataclasses
import io
import json
import re

import pytest
import torch
from rich.console import Console
from torch import nn

from bayesprune import prune_weights, reports, to_variational
from bayesprune.errors import StorageError
from bayesprune.reports import HistoryPoint, Report
from bayesprune.reports.summary import quantities, short, significant


def network(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


BATCH = torch.zeros(4, 6)


@pytest.fixture
def report():
    before = network(8)
    return reports.report(
        before,
        network(4),
        BATCH,
        evaluate=lambda model: 0.9 if model is before else 0.875,
        snr={"0.weight": torch.full((8, 6), 5.0), "2.weight": torch.full((3, 8), 0.5)},
        history=[HistoryPoint(70, 0.9), HistoryPoint(50, 0.89, "half")],
        num_repeats=2,
    )


def texts(report):
    return {row.name: (row.before_text, row.after_text, row.change) for row in quantities(report)}


def test_both_models_are_measured(report):
    assert texts(report) | {"latency": None} == {
        "parameters": ("83", "43", "1.93x fewer"),
        "non-zero parameters": ("83", "43", "1.93x fewer"),
        "MACs": ("288.0", "144.0", "2.00x fewer"),
        "weights and buffers": ("332.0", "172.0", "1.93x smaller"),
        "latency": None,
        "accuracy": ("90.00 %", "87.50 %", "0.972x, -2.50 points"),
    }
    assert [(row.name, row.channels, row.channels_kept) for row in report.layers] == [("0", 8, 4), ("2", 3, 3)]
    assert [row.snr.median for row in report.layers] == [5.0, 0.5]


def test_unit_and_counter_device_batch_and_dtype_are_named(report):
    terms = {row.name: row.terms for row in quantities(report)}
    assert terms["MACs"] == "MACs, torch.utils.flop_counter, FLOPs / 2, batch 4"
    assert re.fullmatch(r"ms, median of 2 on cpu \(.+\), \d+ threads?, batch 4, float32", terms["latency"])
    large = reports.measure(nn.Linear(1000, 2000), torch.zeros(1, 1000), num_repeats=0)
    macs = quantities(reports.report(large, dataclasses.replace(large, macs=500_000)))[2]
    assert (macs.terms[:5], macs.before_text, macs.after_text, macs.change) == (
        "MMACs",
        "2.000",
        "0.5000",
        "4.00x fewer",
    )


def test_two_modules_are_timed_in_turns_and_others_get_a_remark():
    calls = []

    class Recorded(nn.Linear):
        def forward(self, x):
            calls.append(id(self))
            return super().forward(x)

    before, after = Recorded(3, 3), Recorded(3, 3)
    x = torch.zeros(1, 3)
    told = "The latencies were not taken in turns"
    assert not any(told in note for note in reports.report(before, after, x, num_repeats=3).notes)
    turns = [call for i, call in enumerate(calls) if i == 0 or calls[i - 1] != call]
    assert turns == [id(before), id(after)] * 5  # one for the MACs, one to find the passes of a repeat, three repeats
    measured = reports.measure(before, x, num_repeats=1)
    assert any(told in note for note in reports.report(measured, after, x, num_repeats=1).notes)


def test_latencies_under_other_conditions_have_no_ratio():
    model = network(4)
    old, new = (reports.measure(model, torch.zeros(batch, 6), num_repeats=1) for batch in (1, 2))
    report = reports.report(old, new)
    assert texts(report)["latency"][2] == texts(report)["MACs"][2] == "-"
    assert "The latencies have no ratio: device, threads, batch or dtype differ." in report.notes
    assert "The MACs have no ratio: counter or batch differ." in report.notes


def test_a_measurement_taken_before_an_in_place_change_is_compared_with_the_model_after():
    model = network(8)
    before = reports.measure(model, BATCH, label="dense", evaluate=lambda _: 0.5, num_repeats=0)
    with torch.no_grad():
        model[0].weight[:4] = 0
    report = reports.report(before, model, BATCH, num_repeats=0)
    assert report.before is before
    assert texts(report)["non-zero parameters"] == ("83", "59", "1.41x fewer")
    assert texts(report)["accuracy"] == ("50.00 %", "not measured", "-")
    (note,) = report.notes
    assert note == (
        "24 of the 83 parameters in layers (28.92 %) are zeros: zeros make files smaller when compressed, removed "
        "channels make the model faster."
    )


def test_a_variational_model_costs_what_its_means_cost():
    model = network(8)
    dense = reports.measure(model, BATCH, num_repeats=0)
    to_variational(model)
    assert reports.measure(model, BATCH, num_repeats=0) == dense
    with torch.no_grad():
        prune_weights(model, "weights=0.5")
    pruned = reports.measure(model, BATCH, num_repeats=0)
    assert (pruned.parameters, pruned.tensor_bytes, pruned.macs) == (dense.parameters, dense.tensor_bytes, dense.macs)
    assert pruned.nonzero_parameters < dense.nonzero_parameters


def test_scores_that_are_no_fractions_are_shown_as_they_are():
    model = reports.measure(network(4), BATCH, evaluate=lambda _: -0.5, num_repeats=0)
    report = reports.report(model, dataclasses.replace(model, accuracy=-0.625))
    assert texts(report)["accuracy"] == ("-0.5000", "-0.6250", "-0.125")


def test_models_are_left_in_their_modes_and_evaluated_in_eval_mode():
    seen = []

    def accuracy(model):
        seen.append((model.training, torch.is_grad_enabled()))
        model.train()
        return 1.0

    before, after = network(8), network(4).eval()
    reports.report(before, after, BATCH, evaluate=accuracy, num_repeats=1)
    assert seen == [(False, False)] * 2
    assert [module.training for module in (*before.modules(), *after.modules())] == [True] * 4 + [False] * 4


def test_bytes_on_disk_are_of_the_paths(tmp_path):
    for name, size in (("dense", 3000), ("small", 1500)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"1" * size)
    before = reports.measure(network(8), BATCH, num_repeats=0)
    paths = tmp_path / "dense", tmp_path / "small"
    report = reports.report(before, network(4), BATCH, paths=paths, num_repeats=0)
    assert texts(report)["files on disk"] == ("3.000", "1.500", "2.00x smaller")
    row = next(row for row in quantities(report) if row.name == "files on disk")
    assert (row.terms, row.after_over_before) == ("kB, as saved", 0.5)


def test_remarks_name_collapsed_missing_and_uncounted_layers():
    before = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    after = nn.ModuleDict({"a": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    for model in (before, after):
        model.forward = lambda x, layer=model["a"]: layer(x)
    snr = {"a.weight": torch.full((3, 3), 2.0), "b.weight": torch.full((3, 3), 0.1)}
    assert reports.report(before, after, torch.zeros(1, 3), snr=snr, num_repeats=0).notes == (
        "The MACs leave out layers that never ran or that the counter does not know: b, c.",
        "Layers that only the model before has: b.",
        "Layers that only the model after has: c.",
        "The posterior carries no signal, SNR below 1 for every weight, in: b.",
    )


def test_what_cannot_be_reported_is_refused():
    model = network(4)
    with pytest.raises(ValueError, match="same model as before and after; take `measure"):
        reports.report(model, model, BATCH)
    with pytest.raises(ValueError, match="no example_inputs"):
        reports.report(model, network(4))
    with pytest.raises(ValueError, match=r"it has 'model.0.weight', the layers are '0', '2'\. Pass"):
        reports.report(model, network(4), BATCH, snr={"model.0.weight": torch.ones(4, 6)}, num_repeats=0)
    with pytest.raises(ValueError, match="evaluate returned nan"):
        reports.report(model, network(4), BATCH, evaluate=lambda _: float("nan"))
    with pytest.raises(TypeError, match="evaluate returned None; expected a number"):
        reports.report(model, network(4), BATCH, evaluate=lambda _: None)


def test_json_round_trip(report):
    text = report.to_json()
    assert Report.from_json(text) == report
    document = json.loads(text)
    assert document["schema_version"] == 1
    assert document["before"]["parameters"] == 83
    assert document["after_over_before"]["MACs"] == 0.5
    assert len(document["snr"][0]["counts"]) == len(document["snr_log10_edges"]) - 1


def test_json_round_trip_without_optional_parts():
    report = reports.report(network(8), network(4), BATCH, num_repeats=0)
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("schema_version"), "schema_version is None; expected 1"),
        (lambda d: d.update(schema_version=2), "schema_version is 2; expected 1. Read it with the version"),
        (lambda d: d["before"].pop("macs"), "report.before has no 'macs'; it has 'label', 'parameters'"),
        (lambda d: d["after"].update(parameters="43"), "report.after.parameters is '43'; expected an integer"),
        (lambda d: d["after"].update(parameters=True), "report.after.parameters is True; expected an integer"),
        (lambda d: d["after"].update(accuracy=float("nan")), "report.after.accuracy is nan; expected a finite number"),
        (lambda d: d["after"]["layers"].__setitem__(1, 5), r"report.after.layers\[1\] is 5; expected an object"),
        (lambda d: d.update(notes="none"), "report.notes is 'none'; expected a list"),
        (lambda d: d.update(versions=[]), r"report.versions is \[\]; expected an object"),
        (lambda d: d["snr"][0].update(counts=[1]), "has 1 bins; expected 24"),
    ],
)
def test_damaged_json_is_refused_with_the_place(report, change, message):
    document = json.loads(report.to_json())
    change(document)
    with pytest.raises(StorageError, match=message):
        Report.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"report"'])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(StorageError, match="this is no report that can be read"):
        Report.from_json(text)


def test_csv_has_one_line_per_quantity(report):
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    values = {(line["layer"], line["quantity"]): (line["before"], line["after"]) for line in lines}
    assert len(values) == len(lines)
    assert values["", "parameters"] == ("83", "43")
    assert values["", "accuracy"] == ("0.9", "0.875")
    assert values["0", "channels"] == ("8", "4")
    assert values["2", "MACs"] == ("96", "48")
    assert values["0", "median SNR"] == ("5.0", "")


def test_table_is_plain_text_away_from_a_terminal(report):
    stream = io.StringIO()
    Console(file=stream, width=140).print(report.table())
    for text in (stream.getvalue(), str(report)):
        assert "\x1b" not in text
        assert re.search(r"MACs +MACs, torch.utils.flop_counter, FLOPs / 2, batch 4 +288.0 +144.0 +2.00x fewer", text)
        assert re.search(r"0 +Linear +4 / 8 +28 / 56 +28 +96 / 192 +5.00 +0.00 %", text)
        assert "note: The posterior carries no signal" in text


def test_table_shows_labels_as_they_are(report):
    strange = dataclasses.replace(
        report, title="[red]title", before=dataclasses.replace(report.before, label="[b]dense")
    )
    assert "[red]title" in str(strange)
    assert "[b]dense" in str(strange)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.000"), (1234567, "1,234,567"), (0.00012341, "0.0001234"), (12.3, "12.30")]
)
def test_significant_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1 k"), (11_440_128, "11.4 M"), (2.5e9, "2.5 G")]
)
def test_short_counts(value, text):
    assert short(value) == text


def test_latencies_that_scatter_are_said_to():
    measured = reports.measure(nn.Linear(3, 4), torch.zeros(1, 3), num_repeats=3)
    assert measured.latency is not None
    wide = dataclasses.replace(measured.latency, q25_seconds=0.001, median_seconds=0.005, q75_seconds=0.009)
    tight = dataclasses.replace(measured.latency, q25_seconds=0.0019, median_seconds=0.002, q75_seconds=0.0021)
    fast = dataclasses.replace(measured.latency, q25_seconds=0.0002, median_seconds=0.0003, q75_seconds=0.0004)

    def notes(before, after):
        pair = (dataclasses.replace(measured, latency=latency) for latency in (before, after))
        return reports.report(*pair).notes

    assert any("quartiles 1 to 9 ms before, 1.9 to 2.1 ms after" in note for note in notes(wide, tight))
    assert not any("quartiles" in note for note in notes(tight, fast))


def test_ratios_have_columns_where_there_are_some(report):
    without = reports.report(network(8), network(4), BATCH, num_repeats=0)
    for text in (report.to_html(), str(report)):
        assert "median SNR" in text
    for text in (without.to_html(), str(without)):
        assert "channels kept" in text
        assert "SNR" not in text
