"""Two processes, each with half of every batch, train the model of one process, and hold the same at the end."""

import copy
import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import multiprocessing, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import bayesprune as bp
from bayesprune.app.checkpoints import CheckpointEvery, Running
from bayesprune.app.data import Loaders
from bayesprune.app.data.images import Data
from tests.app.test_checkpoints import Killed, Until
from tests.processes import free_port

accelerate = pytest.importorskip("accelerate")

from accelerate.utils import DistributedType  # noqa: E402

from bayesprune.app.tasks import loop  # noqa: E402
from bayesprune.app.tasks.loop import LoaderTask, check_launch  # noqa: E402
from bayesprune.app.tasks.task import Training  # noqa: E402
from bayesprune.foundation.target import Target  # noqa: E402

NUM_IMAGES, NUM_PROCESSES = 32, 2
REMOVAL = Training(9, 0.05, learn_stds=True, target=Target("weights", 0.6))


def task(batch_size):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (NUM_IMAGES,), generator=generator)
    images = torch.randn(NUM_IMAGES, 6, generator=generator) + labels.view(-1, 1)
    loader = DataLoader(TensorDataset(images, labels), batch_size, shuffle=True, generator=torch.Generator())
    data = Data(loader, loader, loader, NUM_IMAGES, "noise", (1, 2, 3), ("a", "b", "c"))
    return LoaderTask(data, accelerate.Accelerator(cpu=True))


def trained(batch_size, *, estimator="moments", with_norm=False, checkpoints=None, num_steps=10**6):
    """A net that draws nothing: its loss on a batch is the mean of those on the halves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if with_norm else nn.Tanh(), nn.Linear(8, 3))
    bp.to_variational(model, relative_std=0.3, estimator=estimator)
    whole = task(batch_size)
    running = None if checkpoints is None else Running(checkpoints, 0, CheckpointEvery(steps=4), (), whole.is_main)
    whole.train(model, Until(num_steps), REMOVAL, checkpoint=running)
    return whole, model


def run(rank: int, folder: str, port: int, kind: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_PROCESSES)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if kind == "FSDP":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
        accelerate.PartialState(cpu=True)  # offers it to processes with GPUs alone, though torch shards on CPUs as well
        accelerate.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    half = NUM_IMAGES // NUM_PROCESSES
    noiseless = "mean" if kind == "FSDP" else "moments"
    found, model = trained(half, estimator=noiseless)
    assert found.accelerator.num_processes == NUM_PROCESSES
    assert kind in found.accelerator.distributed_type.value
    check_launch(found.accelerator, "cpu")
    state = {"model": model.state_dict(), "is_main": found.is_main}
    path = Path(folder) / "running.pt"
    with pytest.raises(Killed):
        trained(half, estimator=noiseless, checkpoints=path, num_steps=6)
    found.accelerator.wait_for_everyone()
    state["resumed"] = trained(half, estimator=noiseless, checkpoints=path)[1].state_dict()
    other, normed = trained(half, estimator="weight_sampling", with_norm=True)
    state |= {"normed": normed.state_dict(), "score": other.score(normed, "validation")}
    if kind == "MULTI":
        state["rounded"] = rounded(half).state_dict()
    torch.save(state, Path(folder) / f"{rank}.pt")
    found.close()


def rounded(batch_size):
    """A net that was rounded to two bits and trained on."""
    torch.manual_seed(0)
    model, whole = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), task(batch_size)
    report = bp.quantize(model, whole.calibration, bits=2)
    whole.train(model, Until(10**6), Training(3, 0.05, rounded=report))
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("plain_accelerate")
@pytest.mark.parametrize("kind", ["MULTI", "FSDP"])
def test_two_processes_train_the_model_of_one(kind, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not come from a draw")  # of the means, with FSDP
        _, expected = trained(NUM_IMAGES, estimator="mean" if kind == "FSDP" else "moments")
    multiprocessing.spawn(run, (str(tmp_path), free_port(), kind), nprocs=NUM_PROCESSES)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(NUM_PROCESSES))
    assert (first.pop("is_main"), second.pop("is_main")) == (True, False)
    if kind == "MULTI":
        assert all(len(first["rounded"][name].unique()) <= 3 for name in ("0.weight", "2.weight", "2.bias"))
    for part in first.keys() & {"model", "normed", "resumed", "rounded"}:
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    assert first["score"] == second["score"]
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(first["model"][name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(first["resumed"][name], first["model"][name]), name
    assert int(sum((~mask).sum() for name, mask in expected.state_dict().items() if name.endswith("mask"))) > 20


@pytest.mark.usefixtures("plain_accelerate")
def test_the_teacher_is_in_the_loss_and_stays_as_it_was(tmp_path):
    """A student of labels that are all wrong ends at its teacher's, and a training that was killed at the same."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    whole = task(8)
    whole.train(teacher, Until(10**6), Training(9, 0.05))
    distill = bp.distillation(teacher, weight=0.9, features={"1": 0.1})
    state = copy.deepcopy(distill.teacher.state_dict())

    def student(num_steps, checkpoints):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        wrong = task(8)
        images, labels = wrong.data.train.dataset.tensors
        wrong.data.train.dataset.tensors = (images, (labels + 1) % 3)
        running = Running(checkpoints, 0, CheckpointEvery(steps=6), wrong.generators, True)
        wrong.train(model, Until(num_steps), Training(9, 0.05, distill=distill), checkpoint=running)
        return model

    model = student(10**6, tmp_path / "whole.pt")
    images, labels = whole.data.train.dataset.tensors
    assert (model(images).argmax(1) == distill.teacher(images).argmax(1)).float().mean() > 0.9
    assert (model(images).argmax(1) == labels).float().mean() > 0.8
    with pytest.raises(Killed):
        student(7, tmp_path / "parts.pt")
    resumed = student(10**6, tmp_path / "parts.pt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in distill.teacher.state_dict().items())


@pytest.mark.usefixtures("plain_accelerate")
@pytest.mark.parametrize("training", [Training(2, 0.05, learn_stds=True), REMOVAL], ids=["stds", "removal"])
def test_a_training_leaves_no_hooks_and_the_next_one_moves_statistics(training):
    torch.manual_seed(0)
    model = bp.to_variational(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    whole = task(8)
    whole.train(model, Until(10**6), training)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    before, mask = model[1].running_mean.clone(), copy.deepcopy(model[0].mask("weight"))
    with bp.sampling(model, "mean"):
        whole.train(model, Until(10**6), Training(1, 0.05))
    assert not torch.allclose(model[1].running_mean, before, rtol=0.1)
    assert mask is None or not model[0].weight[~mask].any()


@pytest.mark.usefixtures("plain_accelerate")
def test_mixed_precision_is_for_the_training_alone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model, dtypes = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), []
    model[1].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    for _ in range(2):
        whole = task(16)
        whole.train(model, Until(10**6), Training(1, 0.05))
        model(whole.example_inputs)
    assert dtypes == 2 * [torch.bfloat16, torch.bfloat16, torch.float32]
    assert not {"forward", "_original_forward"} & vars(model).keys()


@pytest.mark.usefixtures("plain_accelerate")
def test_the_kl_of_a_language_model_is_divided_by_its_label_tokens(monkeypatch):
    asked, attach = [], loop.attach
    monkeypatch.setattr(loop, "attach", lambda *args, **more: asked.append(more["num_data"]) or attach(*args, **more))
    tokens = torch.arange(24).view(4, 6) % 5
    labels = tokens.clone()
    labels[0, :3] = -100
    loader = DataLoader(TensorDataset(tokens, labels), 2)
    accelerator = accelerate.Accelerator(cpu=True)
    whole = LoaderTask(Loaders(loader, loader, loader, 4, "tokens"), accelerator, metric=bp.reports.PERPLEXITY)
    model = bp.to_variational(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)))
    whole.train(model, Until(10**6), Training(1, 0.05, learn_stds=True))
    assert asked == [4 * 5 - 2]


@pytest.mark.usefixtures("plain_accelerate")
def test_a_batch_without_labels_that_count_moves_nothing():
    tokens = torch.arange(24).view(4, 6) % 5
    labels = tokens.clone()
    labels[:2] = -100
    loader = DataLoader(TensorDataset(tokens, labels), 2)
    losses = Losses()
    whole = LoaderTask(
        Loaders(loader, loader, loader, 4, "tokens"), accelerate.Accelerator(cpu=True), metric=bp.reports.PERPLEXITY
    )
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    whole.train(model, losses, Training(1, 0.05))
    assert losses.found[0] == 0 < losses.found[1]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


class Losses:
    """Progress that keeps the losses."""

    @contextmanager
    def training(self, num_epochs, steps_per_epoch):
        self.found = []
        yield self.found.append


def of_two_processes(loader):
    """The task of the second of two processes, which are not there."""
    there = SimpleNamespace(num_processes=2, process_index=1, is_main_process=False, distributed_type="MULTI_CPU")
    return LoaderTask(Loaders(loader, loader, loader, len(loader.dataset), "numbers"), there, example_inputs=0)


def test_each_process_makes_its_batches_as_the_given_loader_does():
    def collate(examples):
        return [f"example {number}" for number in examples]

    loader = DataLoader(list(range(8)), 2, shuffle=True, collate_fn=collate, worker_init_fn=print, pin_memory=False)
    part = of_two_processes(loader)._loader
    batches = list(part)
    assert [len(batch) for batch in batches] == [2, 2]
    assert {text for batch in batches for text in batch} < {f"example {number}" for number in range(8)}
    assert part.worker_init_fn is print


@pytest.mark.parametrize("own", [{"sampler": WeightedRandomSampler([1.0] * 8, 8)}, {"batch_sampler": [[0, 1], [2]]}])
def test_processes_do_not_share_batches_of_a_sampler(own):
    with pytest.raises(ValueError, match=r"are made by .*, and 2 processes are to share them; expected a DataLoader"):
        of_two_processes(DataLoader(list(range(8)), **own))
