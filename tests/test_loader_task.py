"""Two processes, each with half of every batch, train the model of one process, and hold the same at the end."""

import os
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesprune as bp
from bayesprune.data import Data
from tests.test_checkpoints import Until

accelerate = pytest.importorskip("accelerate")

NUM_IMAGES, NUM_PROCESSES = 32, 2


def task(batch_size):
    from bayesprune.loader_task import LoaderTask

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (NUM_IMAGES,), generator=generator)
    images = torch.randn(NUM_IMAGES, 6, generator=generator) + labels.view(-1, 1)
    loader = DataLoader(TensorDataset(images, labels), batch_size, shuffle=True, generator=torch.Generator())
    data = Data(loader, loader, loader, NUM_IMAGES, (1, 2, 3), ("a", "b", "c"), "noise")
    return LoaderTask(data, accelerate.Accelerator(cpu=True))


def trained(batch_size, *, with_norm=False):
    """A net that draws nothing: its loss on a batch is the mean of those on the halves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if with_norm else nn.Tanh(), nn.Linear(8, 3))
    bp.to_variational(model, relative_std=0.3, estimator="weight_sampling" if with_norm else "moments")
    whole = task(batch_size)
    whole.train(model, Until(10**6), num_epochs=6, lr=0.05, learn_stds=True, sparsity=0.4)
    return whole, model


def run(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_PROCESSES)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    found, model = trained(NUM_IMAGES // NUM_PROCESSES)
    assert found.accelerator.num_processes == NUM_PROCESSES
    other, normed = trained(NUM_IMAGES // NUM_PROCESSES, with_norm=True)
    state = {"model": model.state_dict(), "normed": normed.state_dict(), "score": other.score(normed, "validation")}
    torch.save({**state, "is_main": found.is_main}, Path(folder) / f"{rank}.pt")
    found.close()


@contextmanager
def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    yield port


def test_two_processes_train_the_model_of_one(tmp_path):
    _, expected = trained(NUM_IMAGES)
    with free_port() as port:
        multiprocessing.spawn(run, (str(tmp_path), port), nprocs=NUM_PROCESSES)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(NUM_PROCESSES))
    assert (first.pop("is_main"), second.pop("is_main")) == (True, False)
    for part in ("model", "normed"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    assert first["score"] == second["score"]
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(first["model"][name], value, rtol=1e-5, atol=1e-6)
    assert int(sum((~mask).sum() for name, mask in expected.state_dict().items() if name.endswith("mask"))) > 20
