"""timm's own training loop with a BayesPruneTask: the ELBO's steps, what timm does beside them, and resuming."""

import copy
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayesprune as bp
from bayesprune import gates
from bayesprune.errors import StorageError
from bayesprune.layers import named_posteriors, variational_layers
from bayesprune.prune.weights.schedule import PruneSchedule
from bayesprune.train import default_temperature
from tests.train.reference import NUM_DATA, assert_same_parameters, batches, net, stds_of, stock_net, train_on_elbo

timm = pytest.importorskip("timm", minversion="1.0.27")
from timm.loss import BinaryCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.task import (  # noqa: E402
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver, NativeScaler  # noqa: E402

from bayesprune.hosts.timm import BayesPruneTask  # noqa: E402

PROGRAM = Path(__file__).parents[2] / "integrations" / "timm" / "train_like.py"


def classification(model: nn.Module, **options) -> BayesPruneTask:
    return BayesPruneTask(ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False), **options)


def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("integrations_timm_train_like", PROGRAM)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_equal(a, b, path: str = "") -> None:
    """Nested dicts and lists with the same tensors and numbers, to the last bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}.{index}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def write_images(root: Path) -> str:
    """Red and blue images, four of each in each split; returns the folder."""
    from PIL import Image

    for split in ("train", "validation"):
        for name, color in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (32, 32), color=color).save(folder / f"{index}.png")
    return str(root)


NOISY = re.compile("running|num_batches")  # of batch norm, which eager models measure at the means
RECIPES = [
    "--model-ema-decay 0.5 --grad-accum-steps 2 --batch-size 2 --clip-grad 0.1 --clip-mode agc --channels-last",
    pytest.param("--model-ema-decay 0.9 --amp-dtype bfloat16 --clip-grad 1", marks=pytest.mark.slow),
    pytest.param("--model-ema-decay 0.9 --amp-dtype float16 --clip-grad 1 --epochs 8", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_of_train_py_resumes_to_the_last_bit(recipe, tmp_path):
    data = write_images(tmp_path / "images")
    options = ["--data-dir", data, "--model", "test_resnet", "--prune", "weights=0.4", "--epochs", "2", *recipe.split()]
    main = program().main
    torch.manual_seed(0)
    metrics = main(*options, "--output", str(tmp_path / "whole"))
    if "float16" not in recipe.split():  # whose first steps overflow, so that the schedule does not come to its end
        assert metrics["sparsity"] == pytest.approx(0.6, abs=0.001)
    torch.manual_seed(0)
    main(*options, "--output", str(tmp_path / "parts"), "--stop-epoch", "1")
    last = str(tmp_path / "parts" / "last.pth.tar")
    main(*options, "--output", str(tmp_path / "parts"), "--resume", last)
    whole, parts = (torch.load(tmp_path / name / "last.pth.tar", weights_only=True) for name in ("whole", "parts"))
    assert whole["epoch"] > 0
    for key in whole.keys() & {"state_dict", "state_dict_ema", "task_state", "optimizer", "amp_scaler"}:
        assert_equal(whole[key], parts[key], key)
    masks = {key: value for key, value in whole["state_dict_ema"].items() if key.endswith("_mask")}
    assert not all(bool(mask.all()) for mask in masks.values())
    for key, mask in masks.items():
        assert not whole["state_dict_ema"][key.removesuffix("_mask")][~mask].any()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_those_of_the_elbo(accumulation, scaled):
    """The warm-up is a share of the updates; timm's scaler divides what it has multiplied."""
    model = net()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    task = classification(model, warmup=0.5).train()
    optimizer = create_optimizer_v2(task.get_trainable_module(), "momentum", lr=0.05, momentum=0.9)
    task.attach(optimizer, num_steps=4, num_data=NUM_DATA)
    scaler = NativeScaler("cpu")
    torch.manual_seed(2)
    for x, y in batches():
        optimizer.zero_grad()
        for index, part in enumerate(zip(x.chunk(accumulation), y.chunk(accumulation), strict=True)):
            with task.no_sync():
                loss = task(*part)["loss"] / accumulation
            if scaled:
                scaler(loss, optimizer, need_update=index == accumulation - 1)
            else:
                loss.backward()
        if not scaled:
            optimizer.step()

    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    train_on_elbo(expected, sgd, accumulation=accumulation, warmup=0.5)
    assert_same_parameters(model, expected, start)


def test_noise_is_bounded_and_said_as_in_a_loop():
    task = classification(stock_net(), max_noise_cost=1e-3, convert={"relative_std": 1.0}).train()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.0)
    attachment = task.attach(optimizer, num_steps=12, num_data=10**9)

    def train():
        for x, y in batches(10):
            task(x, y)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match=r"adds [\d.]+ to the training loss.*max_noise_cost=0.001"):
        train()
    assert attachment.noise_cost > 5e-3


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_no_weight_decay_is_honoured(name, layer_decay):
    """Means are in groups as in the stock model, stds in groups without decay."""
    found = []
    for is_variational in (False, True):
        model = timm.create_model(name, num_classes=3)
        if is_variational:
            model = classification(model, prune="weights=0.5").get_trainable_module()
        optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=layer_decay)
        names = {id(parameter): key for key, parameter in model.named_parameters()}
        found.append(
            {
                names[id(parameter)]: (group["weight_decay"], group.get("lr_scale"))
                for group in optimizer.param_groups
                for parameter in group["params"]
            }
        )
    stock, converted = found
    assert {key: value for key, value in converted.items() if key in stock} == stock
    assert {decay for key, (decay, _) in converted.items() if key not in stock} == {0.0}
    assert converted.keys() - stock.keys() == stds_of(model).keys()
    assert 0.05 in {decay for decay, _ in stock.values()}


@pytest.mark.parametrize("exclude_head", [False, True])
def test_what_is_clipped_is_what_is_clipped_of_the_stock_model(exclude_head):
    model = timm.create_model("test_resnet", num_classes=3)
    teacher = timm.create_model("test_vit", num_classes=3)
    inner = FeatureDistillationTask(model, teacher, nn.CrossEntropyLoss(), verbose=False)
    for task in (ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False), inner):
        expected = [id(parameter) for parameter in task.get_clip_parameters(exclude_head=exclude_head)]
        wrapped = BayesPruneTask(task)
        assert [id(parameter) for parameter in wrapped.get_clip_parameters(exclude_head=exclude_head)] == expected
        bp.to_deterministic(model)


def test_the_student_of_a_distillation_learns_posteriors(tmp_path):
    """Its projection does not; both are in checkpoints, each in its own part."""
    student, teacher = timm.create_model("test_resnet", num_classes=3), timm.create_model("test_vit", num_classes=3)
    task = BayesPruneTask(FeatureDistillationTask(student, teacher, nn.CrossEntropyLoss(), verbose=False))
    assert len(list(variational_layers(task))) == len(list(variational_layers(student))) > 0
    optimizer = create_optimizer_v2(task.get_trainable_module(), "adamw", lr=1e-3, weight_decay=0.0)
    x, y = torch.randn(2, 3, 160, 160), torch.tensor([0, 1])
    attachment = task.attach(optimizer, DataLoader(TensorDataset(x, y)), num_steps=10)
    before = {key: value.clone() for key, value in stds_of(student).items()}
    task.train()(x, y)["loss"].backward()
    optimizer.step()
    assert attachment.step == 1
    assert attachment.num_data == 2
    assert not any(torch.equal(value, before[key]) for key, value in stds_of(student).items())
    CheckpointSaver(student, optimizer, checkpoint_dir=str(tmp_path), task=task).save_checkpoint(0)
    checkpoint = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert checkpoint["task_state"].keys() == {"projection", "bayesprune"}
    assert checkpoint["state_dict"].keys() == student.state_dict().keys()


@pytest.mark.parametrize("with_posteriors", [False, True])
def test_a_model_that_was_cut_is_the_student_of_timms_own_task(with_posteriors):
    """Its loss is the one of `bp.distillation`: two programs of the same formula."""
    dense = timm.create_model("test_resnet", num_classes=3)
    student = bp.to_variational(copy.deepcopy(dense))
    x, y = torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 2, 0])
    bp.prune_channels(student, x[:1], target="macs=0.7")
    distill = bp.distillation(dense, temperature=4.0, weight=0.9)
    options = {"task_loss_weight": 0.1, "temperature": 4.0, "verbose": False}
    if not with_posteriors:
        bp.to_deterministic(student)
    task = LogitDistillationTask(student, dense, nn.CrossEntropyLoss(), **options)
    if with_posteriors:
        task = BayesPruneTask(task)
        task.attach(create_optimizer_v2(student, "adamw", lr=1e-3, weight_decay=0.0), num_steps=10, num_data=4)
    found = task.train()(x, y)
    expected = distill(found["output"], x, nn.functional.cross_entropy(found["output"], y))
    torch.testing.assert_close(found["loss"], expected)


def test_the_average_has_the_zeros_of_the_model_at_once():
    task = classification(net(), prune=PruneSchedule("weights=0.5", begin=0.0, end=0.5, num_updates=2)).train()
    optimizer = create_optimizer_v2(task.get_trainable_module(), "adamw", lr=0.01, weight_decay=0.0)
    task.attach(optimizer, num_steps=4, num_data=NUM_DATA)
    task.setup_ema(decay=0.9)
    kept = []
    for batch in batches():
        optimizer.zero_grad()
        task(*batch)["loss"].backward()
        optimizer.step()
        task.update_ema()
        pairs = list(zip(named_posteriors(task.model), named_posteriors(task.get_eval_model(ema=True)), strict=True))
        for posterior, average in pairs:
            if posterior.is_weight:
                assert torch.equal(posterior.mask, average.mask), posterior.name
                assert not average.mean[~average.mask].any()
                assert not optimizer.state[posterior.mean]["exp_avg"][~posterior.mask].any()
        kept.append(sum(int(p.mask.sum()) for p, _ in pairs if p.is_weight))
    total = sum(p.mean.numel() for p in named_posteriors(task.model) if p.is_weight)
    assert kept[0] > kept[1] == kept[3] == total - round(0.5 * total)


def test_frozen_layers_stay_as_they_are():
    model = stock_net()
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    task = classification(model, prune=PruneSchedule("weights=0.5", begin=0.0, end=0.5, num_updates=2)).train()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05)
    task.attach(optimizer, num_steps=4, num_data=NUM_DATA)
    for images, labels in batches():
        optimizer.zero_grad()
        task(images, labels)["loss"].backward()
        optimizer.step()
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(model[0].weight, before)
    assert bp.prune_weights(model, "weights=1").removable.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("gated", [False, True])
def test_attached_before_or_after_the_checkpoint_is_loaded(gated):
    models = [gates.add_weight_gates(net()) if gated else net() for _ in range(3)]
    tasks = [classification(model, prune="weights=0.5") for model in models]
    optimizers = [create_optimizer_v2(task.get_trainable_module(), "adamw", lr=0.01) for task in tasks]
    trained, before, after = tasks
    for task, optimizer in zip((trained, before), optimizers, strict=False):
        task.attach(optimizer, num_steps=4, num_data=NUM_DATA)
    trained.train()(*batches()[0])["loss"].backward()
    optimizers[0].step()
    saved = copy.deepcopy(trained.get_checkpoint_state())
    for task in (before, after):
        task.load_checkpoint_state(saved["state_dict"], saved["task_state"])
        assert_equal(task.get_checkpoint_state(), saved)
    after.attach(optimizers[2], num_steps=4, num_data=NUM_DATA)
    assert_equal(after.get_checkpoint_state(), saved)
    assert saved["task_state"]["bayesprune"]["step"] == 1
    assert bool(saved["task_state"]["bayesprune"]["complexity"]) == gated


@pytest.mark.parametrize(("criterion", "factor"), [
    (nn.CrossEntropyLoss(), 1),
    (BinaryCrossEntropy(), 3),
    (BinaryCrossEntropy(sum_classes=True), 1),
    (nn.BCEWithLogitsLoss(), 3),
])  # fmt: skip
def test_num_data_is_what_the_loss_is_a_mean_over(criterion, factor):
    model = timm.create_model("test_resnet", num_classes=3)
    task = BayesPruneTask(ClassificationTask(model, criterion, verbose=False))
    loader = DataLoader(TensorDataset(torch.zeros(7, 1)), batch_size=2)
    attachment = task.attach(torch.optim.SGD(model.parameters()), loader, num_steps=1)
    assert attachment.num_data == 7 * factor
    assert attachment.temperature == default_temperature(model, 7 * factor) < 0.1


def test_lookahead_is_attached_inside():
    """Its slow weights are from before the removal; what was removed stays so in evaluation and in checkpoints."""
    task = classification(net(), prune=PruneSchedule("weights=0.5", begin=0.2, end=0.6, num_updates=2)).train()
    optimizer = create_optimizer_v2(task.get_trainable_module(), "lookahead_sgd", lr=0.01, weight_decay=0.0)
    attachment = task.attach(optimizer, num_steps=12, num_data=NUM_DATA)
    for batch in batches() * 3:
        optimizer.zero_grad()
        task(*batch)["loss"].backward()
        optimizer.step()
    assert attachment.step == 12
    model, x = task.model.eval(), batches()[0][0]
    assert torch.equal(model(x), bp.to_deterministic(copy.deepcopy(model))(x))
    state = model.state_dict()
    removed = [state[key.removesuffix("_mask")][~state[key]] for key in state if key.endswith("_mask")]
    assert torch.cat(removed).numel() > 0
    assert not torch.cat(removed).any()


def test_attach_itself_finds_what_lookahead_wraps():
    model = bp.to_variational(stock_net()).train()
    optimizer = create_optimizer_v2(model, "lookahead_adamw", lr=0.01, weight_decay=0.0)
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA)
    model(batches()[0][0]).square().mean().backward()
    optimizer.step()
    assert attachment.step == 1


def test_what_would_go_wrong_without_a_word(tmp_path):
    task = ClassificationTask(stock_net(), nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters())
    CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), task=task)._save(
        str(tmp_path / "stock.pth.tar"), epoch=0
    )
    with pytest.raises(StorageError, match="trained no posteriors.*--initial-checkpoint"):
        resume_task_checkpoint(classification(net()), str(tmp_path / "stock.pth.tar"))
    task.setup_ema()
    with pytest.raises(ValueError, match=r"before setup_ema\(\)"):
        BayesPruneTask(task)
    with pytest.raises(TypeError, match=r"got Sequential; expected a task of timm"):
        BayesPruneTask(stock_net())
    with pytest.raises(RuntimeError, match=r"call task.attach\(optimizer"):
        classification(net()).train()(*batches()[0])
    with pytest.raises(ValueError, match="not a number of steps"):
        classification(net(), warmup=100)
    with pytest.raises(ValueError, match="std_lr is -1"):
        classification(stock_net(), std_lr=-1)
    with pytest.raises(ValueError, match="variational already"):
        classification(net(), convert={"std": "per_channel"})
    with pytest.raises(ValueError, match="number of training examples is unknown"):
        classification(net()).attach(optimizer, num_steps=3)
    with pytest.raises(ValueError, match="num_steps is 0"):
        classification(net()).attach(optimizer, num_steps=0, num_data=1)


@pytest.mark.slow
def test_a_compiled_task_takes_the_steps_of_the_eager_one():
    """With next to no noise, which a graph draws in an order of its own; running statistics apart, which it keeps."""
    runs = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=3)
        schedule = PruneSchedule("weights=0.5", begin=0.0, end=0.5, num_updates=2)
        task = classification(model, prune=schedule, convert={"relative_std": 1e-6}).train()
        optimizer = create_optimizer_v2(task.get_trainable_module(), "momentum", lr=1e-2, weight_decay=0.0)
        task.setup_ema(decay=0.5)
        if is_compiled:
            task.compile(backend="aot_eager")
            task.compile_ema(backend="aot_eager")
        task.attach(optimizer, num_steps=4, num_data=NUM_DATA)
        start = copy.deepcopy(model.state_dict())
        x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
        for _ in range(4):
            optimizer.zero_grad()
            task(x, y)["loss"].backward()
            optimizer.step()
            task.update_ema()
        states = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
        runs.append({(which, key): value for which, state in states.items() for key, value in state.items()})
    compared = [key for key in runs[0] if isinstance(runs[0][key], torch.Tensor) and not NOISY.search(key[1])]
    assert len(compared) > 50
    for key in compared:
        torch.testing.assert_close(runs[0][key], runs[1][key], rtol=1e-3, atol=1e-4, msg=str(key))
    weight = "conv1.0.weight"
    assert (runs[0]["state_dict", weight] - start[weight]).abs().max() > 1e-2
