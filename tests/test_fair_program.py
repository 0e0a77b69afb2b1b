"""The program behind the fair tables: choices by validation images alone, paired standard errors, equal budgets."""

import itertools
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def row(way, accuracy, *, part="validation", at="cut", seed=0, level=0.5, right=()):
    from fair_choice import packed

    run = {"task": "resnet20", "regime": "none" if at == "cut" else "short", "level": level, "seed": seed}
    images = {"images": len(right), "right": packed(torch.tensor(right, dtype=torch.bool))} if right else {}
    return {"run": run | {"part": part, "at": at} | asdict(way), "accuracy": accuracy, "at_once": 0.5} | images


def test_standard_errors_are_paired_by_seeds_and_images():
    """Differences (0 1 0 0) and (0 1 0 1): 1/32 between the seeds, 11/48 between the images."""
    from fair_choice import paired

    ours, control = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]]), torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]])
    found = paired(list(ours.bool()), list(control.bool()))
    assert found.points == pytest.approx(37.5)
    assert found.standard_error == pytest.approx(100 * (1 / 32 / 2 + 11 / 48 / 4) ** 0.5)
    alone = paired([ours[1].bool()], [control[1].bool()])
    assert alone == pytest.approx((50, 100 * (1 / 3 / 4) ** 0.5))


@pytest.mark.parametrize("number", [1, 8, 13])
def test_what_is_right_comes_back(number):
    from fair_choice import packed, unpacked

    right = torch.rand(number, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpacked(packed(right), number), right)


def test_ways_are_chosen_by_validation_images_of_their_level():
    from fair_choice import chosen
    from fair_training import Way

    inside = Way("magnitude", "mean", "inside layers", "conditioned")
    measured = Way("magnitude", "mean", "measured", "none")
    trained = Way("magnitude", "mean", "measured", "none", "in 3 stages", 0.03, distilled=True)
    rows = [
        row(inside, 0.7),
        row(measured, 0.8),
        row(inside, 0.99, part="test"),
        row(inside, 0.9, level=0.4),
        row(Way("Taylor", "mean", "inside layers", "none"), 0.95),
    ]
    assert chosen(rows, "none", "resnet20", "magnitude", 0.5) == measured
    assert chosen(rows, "none", "resnet20", "magnitude", 0.4) == inside
    assert chosen(rows, "none", "resnet20", "LAMP", 0.5) is None
    rows += [row(trained, 0.85, at="end", level=0.4), row(inside, 0.99, at="end", level=0.4, part="test")]
    assert chosen(rows, "short", "resnet20", "magnitude", 0.5) == trained


def test_every_score_has_as_many_tries_and_pays_for_its_gradients():
    from fair_choice import cut_tries, whens
    from fair_methods import SCORES
    from fair_training import Way

    names = [score for score in SCORES if score != "random"]
    assert {len(cut_tries(score, "resnet20")) for score in names} == {8}
    assert {len(whens(score)) for score in names} == {3}
    assert Way("magnitude", "mean", "measured", "none").evaluations == 0
    assert Way("Taylor", "mean", "measured", "conditioned", "in 3 stages").evaluations == 3 * 2 * 1_024


def test_what_later_runs_load_is_whole_or_not_there(tmp_path, monkeypatch):
    from common import keep

    path = tmp_path / "dense-0.5.pt"
    keep({"weight": torch.ones(3)}, path)
    save = torch.save

    def stopped(value, file):
        save(value, file)
        file.write_bytes(file.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stopped)
    for other in (path, tmp_path / "other.pt"):
        with pytest.raises(KeyboardInterrupt):
            keep({"weight": torch.zeros(3)}, other)
    assert torch.load(path)["weight"].sum() == 3
    assert not (tmp_path / "other.pt").exists()


def test_shares_cut_classes_alike():
    from fair_methods import shares

    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([30.0, 10.0]), "c": torch.tensor([0.0, 9.0, 8.0, 7.0])}
    found = shares(scores, {"a": 1, "b": 1, "c": 2})
    assert [values.tolist() for values in found.values()] == [
        [0.125, 0.375],
        [0.875, 0.625],
        [0.125, 0.875, 0.625, 0.375],
    ]


def test_the_page_sets_rows_against_the_best_control():
    from fair_table import markdown
    from fair_training import Way

    magnitude, laplace = (Way(name, "", "measured", "none") for name in ("magnitude", "Laplace SNR"))
    rows = [{"dense": "resnet20", "accuracy": 0.9, "images": 4, "macs": 100}]
    rows += [row(way, 0.5, level=level) for way in (magnitude, laplace) for level in (0.5, 0.4)]
    rows += [row(magnitude, 0.5, part="test", right=(1, 0, 1, 0)), row(laplace, 0.75, part="test", right=(1, 1, 1, 0))]
    page = markdown(rows)
    assert "| **Laplace SNR** | **75.0** (1) | +25.0 ± 25.0 | measured |" in page
    assert "| *magnitude* | 50.0 (1) |  | measured |" in page


def test_a_second_start_finds_every_row_and_the_page_has_them(monkeypatch, tmp_path):
    """With networks that are numbers: the program's order, its keys and its page."""
    import fair
    from fair_table import markdown

    numbers = itertools.count()
    net = SimpleNamespace(allocated=lambda *way: None, cut=lambda *way: next(numbers))
    steps = {"none": 0, "short": 350, "long": 7_000}.get
    network = SimpleNamespace(name="resnet20", dense=next(numbers), steps=steps, macs=lambda model: 100)
    monkeypatch.setattr(fair, "task", lambda name, data_dir: network)
    monkeypatch.setattr(fair, "trained", lambda *way: net)
    monkeypatch.setattr(fair, "fine_tuned", lambda *way: (next(numbers), next(numbers)))

    def measured(self, model, part):
        right = torch.rand(40, generator=torch.Generator().manual_seed(model)) < 0.5
        found = {"accuracy": float(right.double().mean()), "images": 40, "right": fair.packed(right)}
        return found | {"macs": 30 if model else 100, "params": 100}

    monkeypatch.setattr(fair.Benchmark, "measured", measured)
    made = []
    for _ in range(2):
        benchmark = fair.Benchmark(tmp_path, tmp_path / "fair.json", "resnet20")
        benchmark.without_training(["magnitude", "Laplace SNR"], [0, 1], has_grid=True)
        for is_distilled in (True, False):
            benchmark.with_training("short", ["magnitude", "README's way"], [0], is_distilled=is_distilled)
        benchmark.with_training("long", ["magnitude"], [0], is_distilled=True)
        benchmark.with_training("short", ["magnitude"], [0], is_distilled=True, features=1.0)
        benchmark.without_number("long", ["magnitude", "group ARD", "sizes of channel gates"], [0, 1])
        made.append((next(numbers), len(benchmark.rows)))
    (before, rows), (after, again) = made
    assert after == before + 1, "nothing ran twice"
    assert rows == again
    ends = [row["run"] for row in benchmark.rows if row.get("run", {}).get("at") == "end"]
    stopped = [run for run in ends if run["level"] == "SNR below one"]
    assert [(run["score"], run["seed"]) for run in stopped if run["part"] == "test"] == [
        (score, seed) for score in ("group ARD", "sizes of channel gates") for seed in (0, 1)
    ]
    assert sum(run["part"] == "validation" for run in stopped) == 2, "the learning rate of what says sizes alone"
    ends = [run for run in ends if run["regime"] == "short"]
    assert sum(run["part"] == "validation" for run in ends) == 2 * 4
    assert sum(run["part"] == "test" and not run["features"] for run in ends) == 2 * 2 * 2
    assert sum(run["features"] == 1.0 for run in ends) == 2
    page = markdown(benchmark.rows)
    for heading in (
        "No training\n",
        "0.4 of the MACs, under equal allocation",
        "Short, distilled\n",
        "Short, distilled, outputs of blocks compared with the weight 1\n",
        "Short, cross-entropy alone",
        "Long, no number given: an SNR below one, or a closed gate, is removed",
    ):
        assert f"### {heading}" in page or f"### No training, {heading}" in page
    assert "| **group ARD** | 0.300 |" in page
    assert "| magnitude, in its own way to as many MACs |" in page


def test_attention_goes_to_the_fewest_inputs_that_explain_enough():
    """Contributions 6, 3, 1 and -5, and 4 of the stream: 6 and 4 are 10 of 14, and with 3 they are 13."""
    from attentive import through

    weight, x = torch.tensor([[3.0, 1.0, 1.0, -5.0]]), torch.tensor([[2.0, 3.0, 1.0, 1.0]])
    stream, attention = torch.tensor([[4.0]]), torch.tensor([[2.0]])
    below, beside = through(attention, weight, x, stream=stream, share=0.7)
    torch.testing.assert_close(below, torch.tensor([[1.2, 0, 0, 0]]))
    torch.testing.assert_close(beside, torch.tensor([[0.8]]))
    below, beside = through(attention, weight, x, stream=stream, share=0.75)
    torch.testing.assert_close(below * 13 / 2, torch.tensor([[6.0, 3, 0, 0]]))
    below, _ = through(attention, weight, x, signs=torch.tensor([[-1.0]]), stream=stream)
    torch.testing.assert_close(below, torch.tensor([[0.0, 0, 0, 2]]))


def test_attention_comes_down_a_resnet_whole():
    """What a block passes down, and what passes through its inner channels, is no more than the class has, one."""
    from attentive import resnet_channels
    from cifar_resnet import ResNet

    torch.manual_seed(0)
    model = ResNet(1).eval()
    found = resnet_channels(model, torch.randn(2, 3, 32, 32), 1.0)
    assert list(found) == [f"layer{stage}.0.conv1" for stage in (1, 2, 3)]
    for scores in found.values():
        assert (scores >= 0).all()
        assert 0.1 < float(scores.sum()) <= 2 + 1e-4
