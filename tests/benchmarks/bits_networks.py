"""Networks that `bits.py` makes smaller: the pruned ones of `mnist.py`, kept in the work directory."""

import copy
from argparse import Namespace
from pathlib import Path

import common
import torch
from mnist import Benchmark, _cutter, _phase
from mnist_methods import Data, Network, lenet5, mlp, train, without_posterior
from mnist_tasks import POSTERIOR, TASKS
from mnist_units import compact
from torch import nn

TASK_OF = {"MNIST 784-300-100-10": "MNIST weights", "LeNet-5": "LeNet-5 weights"}
NUM_INPUTS = 784


def options_of(description: str, out: str) -> Namespace:
    """The options of a program that works on these networks: those of `common`, and `--work`; data must be given."""
    parser = common.parser(description, out)
    parser.add_argument("--work", type=Path, default=Path("work-bits"), help="folder for networks, that of bits.py")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("no data: give --data-dir or set BAYESPRUNE_DATA to the folder that holds MNIST/raw/*.gz")
    return options


def pruned(benchmark: Benchmark, name: str, target: float, seed: int) -> Network:
    """The network with `target` percent of its weights kept by the posterior, trained on after the last cut."""
    task = next(task for task in TASKS if task.name == TASK_OF[name])
    path = _path(benchmark.work, name, target, seed)
    if not path.exists():
        data = benchmark.data(task, validation=False)
        net, _ = benchmark.tuned(task, POSTERIOR, seed, None, validation=False)
        torch.manual_seed(seed + 100)
        for level in task.levels:
            train(net, data, _phase(task.cut, level.cut), cut=_cutter(net, task, level, POSTERIOR), cuts=24)
            compact(net)
            done = without_posterior(net)
            if level.after:
                train(done, data, _phase(task.after, level.after))
            assert not isinstance(level.target, tuple), "a task about weights"
            common.keep(done, _path(benchmark.work, name, level.target, seed))
            if level.target == target:
                break
    return torch.load(path, weights_only=False)


def data_of(benchmark: Benchmark, name: str) -> Data:
    """Its images and labels."""
    task = next(task for task in TASKS if task.name == TASK_OF[name])
    return benchmark.data(task, validation=False)


def with_all_inputs(net: Network) -> nn.Sequential:
    """The variational model that reads whole images, with zero weights for the pixels that were dropped."""
    model = copy.deepcopy(net.model)
    if net.inputs is None:
        return model
    first, inputs = model[0], net.inputs
    assert isinstance(first, nn.Linear)
    for key, tensor in (*first._parameters.items(), *first._buffers.items()):
        if tensor is not None and tensor.dim() == 2 and tensor.shape[1] == len(inputs):
            fill = tensor.detach().min() if key.endswith("log_std") else torch.zeros((), dtype=tensor.dtype)
            whole = fill.expand(len(tensor), NUM_INPUTS).clone()
            whole[:, inputs] = tensor.detach()
            holder = first._parameters if key in first._parameters else first._buffers
            holder[key] = nn.Parameter(whole, tensor.requires_grad) if key in first._parameters else whole
    first.in_features = NUM_INPUTS
    return nn.Sequential(nn.Flatten(), *model)


def _path(work: Path, name: str, target: float, seed: int) -> Path:
    return work / f"bits-{name.replace(' ', '-')}-{target:g}-{seed}.pt"


def dense(name: str) -> nn.Module:
    """The network before it is pruned."""
    return mlp() if name.startswith("MNIST") else lenet5()
