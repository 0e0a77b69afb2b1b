"""timm's loop with a BayesPruneTask in two processes, and its recipe under torchrun."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

import bayesprune as bp
from bayesprune.prune.weights.schedule import PruneSchedule
from tests.oracles import HandMadeAdam
from tests.train import test_distributed as one_process
from tests.train.reference import NUM_DATA, assert_same_parameters, batches, stds_of

timm = pytest.importorskip("timm", minversion="1.0.27")
from tests.hosts.test_timm_task import PROGRAM, assert_equal, classification, write_images  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed"),
]


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    schedule = PruneSchedule("weights=0.6", begin=0.0, end=0.5, num_updates=2)
    model = one_process.net()
    prior = bp.priors.Gaussian(0.3)
    task = classification(model, prior=prior, warmup=0.0, prune=schedule).train()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    adams = {name: HandMadeAdam(1e-2) for name in stds_of(model)}
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=one_process.LR)
    task.prepare_distributed()
    task.attach(optimizer, num_steps=4, num_data=NUM_DATA)
    for number, batch in enumerate(batches()):
        torch.manual_seed(number)
        optimizer.zero_grad()
        task(*(part.chunk(2)[rank] for part in batch))["loss"].backward()
        optimizer.step()
        torch.manual_seed(number)
        one_process.step_on_elbo(expected, batch, rank, adams)
        bp.prune_weights(expected, f"weights={1 - schedule.sparsity_at((number + 1) / 4)}")
    assert_same_parameters(model, expected, start, rel=1e-8)
    torch.save(task.get_checkpoint_state(), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_take_the_steps_of_the_elbo(tmp_path):
    multiprocessing.start_processes(run, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_equal(first, second)
    assert sum(int((~mask).sum()) for key, mask in first["state_dict"].items() if key.endswith("_mask")) == 46


def test_the_recipe_under_torchrun(tmp_path):
    """Two processes; a run that is resumed ends where the whole one does."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(PROGRAM)]
    data = write_images(tmp_path / "images")
    options = ["--data-dir", data, "--model", "test_resnet", "--prune", "weights=0.4", "--model-ema-decay", "0.5"]
    checkpoint = tmp_path / "start.pth"
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), checkpoint)
    options += ["--batch-size", "2", "--grad-accum-steps", "2", "--initial-checkpoint", str(checkpoint)]
    last = str(tmp_path / "parts" / "last.pth.tar")
    for more in (["whole"], ["parts", "--stop-epoch", "2"], ["parts", "--resume", last]):
        command = [*torchrun, *options, "--output", str(tmp_path / more[0]), *more[1:]]
        subprocess.run(command, cwd=PROGRAM.parents[2], timeout=200, check=True)
    whole, parts = (torch.load(tmp_path / name / "last.pth.tar", weights_only=True) for name in ("whole", "parts"))
    for key in ("state_dict", "state_dict_ema", "task_state", "optimizer"):
        assert_equal(whole[key], parts[key], key)
