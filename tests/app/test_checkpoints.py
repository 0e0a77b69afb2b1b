"""A job that was killed goes on to the weights of one that was not, bit for bit; wrong checkpoints are refused."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import bayesprune as bp
from bayesprune.app.checkpoints import CheckpointEvery, Checkpoints, ResumableTask
from bayesprune.app.data.images import Data
from bayesprune.app.pipeline import Recipe, run
from bayesprune.errors import StorageError

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

NUM_IMAGES, BATCH = 36, 8


class Images(Dataset):
    """Augmented by noise, so that the order of random numbers counts."""

    def __init__(self, count, noise):
        generator = torch.Generator().manual_seed(count)
        self.labels = torch.randint(3, (count,), generator=generator)
        self.images = torch.randn(count, 1, 6, 6, generator=generator) + self.labels.view(-1, 1, 1, 1)
        self.noise = noise

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index] + self.noise * torch.randn(1, 6, 6), self.labels[index]


def data():
    train = DataLoader(
        Images(NUM_IMAGES, 0.1), BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(3)
    )
    others = [DataLoader(Images(count, 0.0), BATCH) for count in (20, 21)]
    return Data(train, *others, NUM_IMAGES, "noise", (1, 6, 6), ("a", "b", "c"))


class Killed(BaseException):
    pass


class Until:
    """Ends the process, as it were, when so many steps were made."""

    def __init__(self, num_steps):
        self.left, self.said = num_steps, []

    def stage(self, title):
        self.said.append(title)

    say = stage

    @contextmanager
    def training(self, num_epochs, steps_per_epoch):
        def advance(loss):
            if loss == loss:  # not one of those that are made up for
                self.left -= 1
                if self.left < 0:
                    raise Killed

        yield advance


def job(folder, progress, *, target, tolerance=None, bits=None, every=3):
    from bayesprune.app.tasks.loop import LoaderTask

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 3)
    )
    recipe = Recipe(
        target=target,
        tolerance=tolerance,
        num_epochs=2,
        train_lr=0.02,
        lr=0.01,
        std="per_weight",
        estimator="auto",
        granularity=("mlp", "width"),
        by="weights" if target else "macs",
        bits=bits,
    )
    task = LoaderTask(data(), accelerate.Accelerator(cpu=True))
    request = {"target": str(target), "tolerance": tolerance, "bits": bits}
    checkpoints = Checkpoints(folder / "checkpoints", request, CheckpointEvery(steps=every), generators=task.generators)
    resumable = ResumableTask(task, checkpoints)
    run(model, resumable, recipe, folder / "out", progress, name="small", is_trained=False)
    resumable.close()
    from safetensors.torch import load_file

    return load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [
        ({"target": "weights=0.4"}, 11),
        ({"target": None, "tolerance": 0.6}, 11),
        ({"target": "weights=0.4", "bits": 3}, 11),
        ({"target": "weights=0.4", "every": 4}, 13),
    ],
    ids=["weights", "channels", "bits", "between-epochs"],
)
def test_a_killed_job_goes_on_to_the_last_bit(options, num_steps, tmp_path):
    expected = job(tmp_path / "whole", Until(10**6), **options)
    survived, kills = None, 0
    while survived is None:
        progress = Until(num_steps)
        try:
            survived = job(tmp_path / "killed", progress, **options)
        except Killed:
            kills += 1
            assert kills < 40, "every run makes eleven steps or more, of which at most two are lost"
    assert kills >= 2
    assert any("checkpoint" in text for text in progress.said)
    assert expected.keys() == survived.keys()
    assert all(torch.equal(expected[name], survived[name]) for name in expected)
    assert not (tmp_path / "killed" / "checkpoints").exists()


def test_other_options_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(Killed):
        job(tmp_path, Until(5), target="macs=0.6")
    with pytest.raises(StorageError, match=r"target .*macs.*weights.*delete"):
        job(tmp_path, Until(5), target="weights=0.4")
    path = tmp_path / "checkpoints" / "running.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StorageError, match=r"running\.safetensors.*Delete"):
        job(tmp_path, Until(5), target="macs=0.6")


def test_a_job_that_left_nothing_may_be_given_other_options(tmp_path):
    """As after an error in the first of them, which a user mends and tries again."""
    with pytest.raises(bp.errors.InfeasibleTargetError):
        job(tmp_path, Until(5), target="macs=0.001")
    with pytest.raises(Killed):
        job(tmp_path, Until(1), target="macs=0.6")
    with pytest.raises(Killed):
        job(tmp_path, Until(5), target="weights=0.4")
    with pytest.raises(StorageError, match="with other options"):
        job(tmp_path, Until(5), target="macs=0.6")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500", CheckpointEvery(steps=500)),
        ("30s", CheckpointEvery(seconds=30)),
        ("10 min", CheckpointEvery(seconds=600)),
        ("2h", CheckpointEvery(seconds=7200)),
    ],
)
def test_an_interval_is_steps_or_a_time(text, expected):
    assert CheckpointEvery.parse(text) == expected


@pytest.mark.parametrize("text", ["", "0", "often", "1.5min", "-3"])
def test_no_interval(text):
    with pytest.raises(ValueError, match="10min"):
        CheckpointEvery.parse(text)
