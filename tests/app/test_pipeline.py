"""The pipeline over a task whose metric is known: what tolerance means, and what the report says of the metric."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bayesprune as bp
from bayesprune.app.pipeline import Recipe, run
from bayesprune.reports import ACCURACY, PERPLEXITY, Report

pytest.importorskip("matplotlib")
pytest.importorskip("accelerate")


class Silent:
    def __init__(self):
        self.said = []

    def stage(self, title):
        self.said.append(title)

    say = stage

    @contextmanager
    def training(self, num_epochs, steps_per_epoch):
        yield lambda loss: None


class BySize:
    """Nothing is learned; the metric follows from the number of weights that are not zero."""

    description = "nothing"
    calibration = ((torch.linspace(-1, 1, 64).view(8, 8), torch.arange(8) % 4),)
    is_main, is_sharded = True, False

    def __init__(self, metric, score):
        self.metric, self.of_size, self.example_inputs, self.trained = metric, score, torch.randn(1, 8), []
        self.teachers = []

    def train(self, model, progress, training, *, checkpoint=None):
        self.trained.append((training.num_epochs, training.learn_stds, training.target))
        self.teachers.append(None if training.distill is None else training.distill.teacher)
        model.eval()

    def score(self, model, split):
        weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
        return self.of_size(sum(int(weight.count_nonzero()) for weight in weights) / (8 * 40 + 40 * 4))

    def save_preparation(self, directory):
        (directory / "beside.txt").write_text("")

    def loading_instructions(self, directory):
        return "load"


def smallest(metric, score, tolerance, out, by="macs", **options):
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4))
    recipe = Recipe(
        target=None,
        tolerance=tolerance,
        num_epochs=2,
        train_lr=0.1,
        lr=0.1,
        std="per_channel",
        estimator="auto",
        granularity=("width",),
        by=by,
        **options,
    )
    task, progress = BySize(metric, score), Silent()
    report = run(model, task, recipe, out, progress, name="two layers", is_trained=True).report
    return report, task, progress.said


def test_perplexity_may_rise_by_the_tolerance_as_a_part_of_itself(tmp_path):
    report, task, said = smallest(PERPLEXITY, lambda kept: 20 / kept, 1.0, tmp_path)
    assert report.before.accuracy == 20
    assert 35 < report.after.accuracy <= 40
    assert all(trained == (1, False, None) for trained in task.trained[1:-1])
    assert "validation perplexity 20 with 524 non-zero parameters" in said
    again = Report.from_json((tmp_path / "report.json").read_text())
    assert again.metric == PERPLEXITY
    assert 'perplexity,1,"as evaluated, lower is better"' in again.to_csv()
    assert "<h2>Perplexity against size</h2>" in again.to_html()
    assert (tmp_path / "beside.txt").is_file()


def test_accuracy_may_fall_by_the_tolerance_in_its_own_unit(tmp_path):
    report, _, said = smallest(ACCURACY, lambda kept: 0.4 + kept / 2, 0.1, tmp_path)
    assert report.before.accuracy == 0.9
    assert 0.8 <= report.after.accuracy < 0.84
    assert "validation accuracy 90.00% with 524 non-zero parameters" in said


def test_single_weights_go_where_the_search_is_for_them(tmp_path):
    report, task, said = smallest(ACCURACY, lambda kept: 0.4 + kept / 2, 0.1, tmp_path, by="weights")
    assert 0.8 <= report.after.accuracy < 0.82
    assert report.after.parameters == report.before.parameters == 524
    assert report.after.nonzero_parameters < 450
    assert "Remove single weights" in said
    (curve,) = (text for text in said if "of the weights kept (tolerance 0.1)" in text)
    assert "smallest" in curve
    assert task.trained[-1] == (2, False, None)


@pytest.mark.parametrize("by", ["macs", "weights"])
def test_the_dense_model_teaches_in_each_training_after_a_removal(by, tmp_path):
    options = {"by": by, "relative_std": 0.1}
    _, task, _ = smallest(ACCURACY, lambda kept: 0.4 + kept / 2, 0.1, tmp_path / "taught", **options)
    others = task.teachers
    if by == "weights":
        first, *others = others
        assert first is None, "the posteriors are learned without it"
    assert len(others) > 2
    assert all(teacher is others[0] for teacher in others)
    assert others[0][0].weight.shape == (40, 8)
    _, task, _ = smallest(ACCURACY, lambda kept: 0.4 + kept / 2, 0.1, tmp_path / "alone", distill=False, **options)
    assert task.teachers == [None] * len(task.teachers)


def batches(rows: int = 96) -> dict[str, DataLoader]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (rows,), generator=generator)
    inputs = torch.randn(rows, 8, generator=generator) + 2 * labels.view(-1, 1)
    return {split: DataLoader(TensorDataset(inputs, labels), 16) for split in ("train", "validation", "test")}


@pytest.mark.parametrize(("target", "by_gates"), [("macs=0.5", False), ("weights=0.5", False), ("weights=0.5", True)])
def test_compress_does_the_job_from_python(target, by_gates, tmp_path, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3))
    data = batches()
    with caplog.at_level("INFO", logger="bayesprune"):
        small, report = bp.compress(model, data, target, out=tmp_path / "small", num_epochs=4, lr=0.02, gates=by_gates)
    assert small is model
    assert report.after.accuracy == bp.reports.accuracy(small, data["test"]) > report.before.accuracy
    kept = report.after.macs / report.before.macs
    if target == "weights=0.5":
        kept = float(torch.cat([small[0].weight.flatten(), small[2].weight.flatten()]).ne(0).float().mean())
    assert 0.4 < kept <= 0.55
    loaded = bp.load(tmp_path / "small", model=nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3)))
    x = torch.randn(4, 8)
    assert torch.equal(loaded.eval()(x), small.eval()(x))
    said = [record.message for record in caplog.records]
    assert any("Fine-tune the smaller model" in message for message in said)
    assert any("Learn how certain" in message for message in said) == (target == "weights=0.5" and not by_gates)


@pytest.mark.parametrize(("by_gates", "expected"), [(True, [("mean", 0.0)]), (False, [("auto", "auto")] * 2)])
def test_gates_of_compress_learn_without_noise_and_kl(by_gates, expected, monkeypatch, tmp_path):
    found = []

    def attach(optimizer, model, *, temperature, **options):
        found.append((model[0].estimator, temperature))
        return bp.attach(optimizer, model, temperature=temperature, **options)

    monkeypatch.setattr("bayesprune.app.tasks.loop.attach", attach)
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3))
    bp.compress(model, batches(), "weights=0.5", out=tmp_path, num_epochs=1, gates=by_gates)
    assert found == expected


@pytest.mark.parametrize("train_rounded", [True, False])
def test_compress_rounds_and_codes(train_rounded, tmp_path):
    pytest.importorskip("constriction")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 400), nn.ReLU(), nn.Linear(400, 3))
    options = {"out": tmp_path, "num_epochs": 1, "lr": 0.02, "bits": 4, "coding": "entropy"}
    small, report = bp.compress(model, batches(), "weights=0.5", **options, train_rounded=train_rounded)
    assert all(len(parameter.unique()) <= 15 for parameter in small.parameters())
    assert int(small[0].weight.count_nonzero() + small[2].weight.count_nonzero()) <= 2200
    labels = ["fine-tuned", "4 bits", "4 bits, trained on"][: 2 + train_rounded]
    assert [point.label for point in report.history][-len(labels) :] == labels
    (table,) = Report.from_json((tmp_path / "report.json").read_text()).tables
    assert [row[0] for row in table.rows] == labels
    assert ("held to them while training went on" in table.remark) == train_rounded
    assert "Rounded weights" in str(report)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < sum(parameter.nbytes for parameter in small.parameters()) / 6
    loaded = bp.load(tmp_path, model=nn.Sequential(nn.Linear(8, 400), nn.ReLU(), nn.Linear(400, 3)))
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_training_goes_on_with_rounded_weights(tmp_path):
    """At three bits the loss falls well below that of rounding alone."""
    losses = {}
    for train_rounded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3))
        options = {"out": tmp_path / str(train_rounded), "num_epochs": 8, "lr": 0.02, "bits": 3, "distill": False}
        small, _ = bp.compress(model, batches(), "macs=0.5", **options, train_rounded=train_rounded)
        assert all(len(parameter.unique()) <= 7 for parameter in small.parameters())
        x, y = batches()["train"].dataset.tensors
        losses[train_rounded] = float(nn.functional.cross_entropy(small(x), y).detach())
    assert losses[True] < 0.75 * losses[False]


class Spoils(BySize):
    """Training with rounded weights leaves the first layer without any."""

    def train(self, model, progress, training, *, checkpoint=None):
        super().train(model, progress, training, checkpoint=checkpoint)
        if training.rounded is not None:
            model[0].weight.data.zero_()


@pytest.mark.parametrize(
    ("metric", "score"),
    [
        (ACCURACY, lambda kept: 10 + kept),
        (PERPLEXITY, lambda kept: 10 - kept),
        (PERPLEXITY, lambda kept: 10 - kept if kept > 0.3 else math.nan),
    ],
    ids=["accuracy", "perplexity", "nan"],
)
def test_training_that_makes_rounded_weights_worse_is_undone(metric, score, tmp_path):
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4))
    task, progress = Spoils(metric, score), Silent()
    recipe = Recipe("macs=0.5", None, 2, 0.1, 0.1, None, "auto", ("width",), bits=4)
    report = run(model, task, recipe, tmp_path, progress, name="two layers", is_trained=True).report
    assert model[0].weight.any()
    assert "that was worse: the rounded weights stay as they were" in progress.said
    assert "the result has the weights of before" in report.tables[0].remark
    assert report.after.accuracy == task.score(model, "test")
    assert [point.label for point in report.history][:4] == ["dense", "removed", "fine-tuned", "4 bits"]
    assert Report.from_json((tmp_path / "report.json").read_text()).history == report.history


def test_an_error_in_a_fine_tuning_leaves_the_stds_to_be_trained(tmp_path):
    class Fails(BySize):
        def train(self, model, progress, training, *, checkpoint=None):
            if not training.learn_stds:
                raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4))
    recipe = Recipe("weights=0.5", None, 1, 0.1, 0.1, None, "auto", ("width",))
    with pytest.raises(KeyboardInterrupt):
        run(model, Fails(ACCURACY, lambda kept: kept), recipe, tmp_path, Silent(), name="two layers", is_trained=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_test_score_that_is_no_number_is_said_in_the_report(bad, tmp_path):
    class Undefined(BySize):
        def score(self, model, split):
            score = super().score(model, split)
            return bad if split == "test" and score > 10 else score

    task = Undefined(PERPLEXITY, lambda kept: 9 / kept)
    model, recipe = (
        nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4)),
        Recipe("macs=0.5", None, 1, 0.1, 0.1, None, "auto", ("width",)),
    )
    report = run(model, task, recipe, tmp_path, Silent(), name="two layers", is_trained=True).report
    assert (report.before.accuracy, report.after.accuracy) == (9, None)
    assert f"The test perplexity after is {bad}, which is no finite number" in " ".join(str(report).split())
    again = Report.from_json((tmp_path / "report.json").read_text())
    assert again.notes == report.notes
    assert "Look for NaN and infinity in the test data" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "beside.txt").is_file()


def test_sharded_weights_are_not_held_to_grids(tmp_path):
    task = BySize(ACCURACY, lambda kept: kept)
    task.is_sharded = True
    recipe = Recipe("macs=0.5", None, 1, 0.1, 0.1, None, "auto", ("width",), bits=4)
    with pytest.raises(ValueError, match=r"\(FSDP\), where they cannot be held to grids; .* --no-train-rounded"):
        run(nn.Linear(8, 4), task, recipe, tmp_path, Silent(), name="one layer", is_trained=True)
    assert not task.trained


def test_compress_saves_smaller_versions(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3))
    small, _ = bp.compress(model, batches(), "macs=0.8", out=tmp_path, num_epochs=1, levels=("macs=0.5", "weights=0.5"))
    dense = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3))
    half = bp.load(tmp_path, "macs=0.5", model=copy.deepcopy(dense))
    assert half[0].out_features <= 0.5 * small[0].out_features
    sparse = bp.load(tmp_path, "weights=0.5", model=copy.deepcopy(dense))
    assert sparse[0].out_features == small[0].out_features
    assert bp.load(tmp_path, model=dense)[0].out_features == small[0].out_features


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(8), 0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": "macs=0.5"}, "levels is 'macs=0.5'; expected several targets"),
        ({"levels": ("macs=2",)}, "levels got the target 'macs=2'"),
        ({"levels": ("macs=0.5", "macs=0.50")}, "levels has two of one name: macs=0.5, macs=0.5"),
        ({"levels": ("macs=0.01",)}, "macs=0.01 cannot be reached"),
        ({"target": "weights=0.001"}, "0 of 440 weights were to stay"),
        ({"corruptions": True}, "corruptions are for images, and an example has none"),
        ({"num_epochs": 0}, "num_epochs is 0; expected 1 or more"),
        ({"num_epochs": 1.5}, "num_epochs is 1.5; expected 1 or more"),
        ({"lr": "1e-3"}, "lr is '1e-3'; expected a learning rate"),
        ({"metric": "accuracy"}, "metric is 'accuracy'; expected bp.reports.ACCURACY"),
        ({"out": __file__}, "test_pipeline.py', which is a file; expected a directory"),
        ({"bits": 1}, "bits is 1; expected the width of a weight, from 2 to 12"),
        ({"gates": True, "target": "macs=0.5"}, "gates choose single weights for a target; give one"),
        ({"gates": True, "target": "weights=0.5", "estimator": "flipout"}, "and no stds are learned"),
        ({"target": "macs=0.5", "estimator": "flipout"}, "estimator is 'flipout', and no stds are learned"),
        ({"coding": "zip"}, "coding is 'zip'; expected \"entropy\""),
        ({"data": {"train": []}}, "data has no 'validation' batches"),
        ({"data": batches()["train"]}, "data is a DataLoader; expected a mapping of train, validation and test"),
        ({"data": batches() | {"train": DataLoader(Endless())}}, "Endless without a length; expected a dataset"),
        ({"data": batches() | {"test": iter(batches()["test"])}}, "the test batches are a .*, which one pass uses up"),
        ({"data": batches() | {"validation": (batch for batch in [])}}, "the validation batches are a generator"),
        ({"data": batches() | {"validation": []}}, "there is no validation batch"),
        ({"data": batches() | {"test": torch.zeros(4, 8)}}, r"data\['test'\] is a Tensor; expected batches"),
        ({"metric": PERPLEXITY}, "expected those of a causal language model, .* take `accuracy`"),
        ({"data": batches() | {"train": DataLoader([0], 2, drop_last=True)}}, "there is no train batch.*drop_last"),
        ({"target": None}, "expected one of them"),
        ({"target": None, "tolerance": float("nan")}, "tolerance is nan; expected the largest accepted loss"),
        ({"tolerance": 0.1}, "expected one of them"),
        ({"target": "flops=0.5"}, "compress got the target 'flops=0.5'"),
        ({"granularity": ("hands",)}, "expected some of"),
        ({"data": {split: [torch.zeros(2, 8)] for split in ("train", "validation", "test")}}, "DataLoader"),
    ],
)
def test_compress_refuses_before_any_training(options, message, tmp_path):
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        bp.compress(model, **{"data": batches(), "out": tmp_path / "small"} | options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("label", [12, -1])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_label_that_is_no_class_leaves_the_model_as_it_was(split, label, tmp_path):
    data = batches()
    data[split].dataset.tensors[1][90] = label
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3))
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    with pytest.raises(
        ValueError, match=f"has the label {label}, and the model has 3 outputs; expected .* from 0 to 2"
    ):
        bp.compress(model, data, "macs=0.5", out=tmp_path / "small", num_epochs=1)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "small").exists()
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32])
def test_labels_are_whole_numbers_of_any_width(dtype, tmp_path):
    data = batches()
    for loader in data.values():
        loader.dataset.tensors = (loader.dataset.tensors[0], loader.dataset.tensors[1].to(dtype))
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3))
    if dtype.is_floating_point:
        with pytest.raises(ValueError, match=r"labels of a training batch are torch\.float32; expected whole numbers"):
            bp.compress(model, data, "macs=0.5", out=tmp_path, num_epochs=1)
        assert model[0].out_features == 40
        return
    bp.compress(model, data, "macs=0.5", out=tmp_path, num_epochs=1)
    assert model[0].out_features == 20
    bp.laplace.fit_laplace(bp.to_variational(model), data["train"], loss=bp.laplace.cross_entropy)


def test_a_level_out_of_reach_of_what_a_search_found_leaves_the_result(tmp_path):
    with pytest.raises(bp.errors.InfeasibleTargetError, match="macs=0.2 cannot be reached"):
        smallest(ACCURACY, lambda kept: 1.0, 0.1, tmp_path, levels=("macs=0.2",))
    loaded = bp.load(tmp_path, model=nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4)))
    assert loaded[0].out_features < 20


@pytest.mark.parametrize(("std", "target"), [("per_channel", "macs=0.5"), ("rank_one", "weights=0.5")])
def test_compress_takes_a_model_with_the_posterior_that_it_would_make(std, target, tmp_path):
    model = bp.to_variational(nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3)), std=std)
    options = {} if std == "per_channel" else {"std": std}
    small, _ = bp.compress(model, batches(), target, out=tmp_path, num_epochs=1, **options)
    assert type(small[0]) is nn.Linear


@pytest.mark.usefixtures("plain_accelerate")
def test_compress_takes_a_step_after_each_batch(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="launched with gradient_accumulation_steps=4, and takes a step after each"):
        bp.compress(nn.Linear(8, 3), batches(), out=tmp_path)
