"""What needs all of a model at once refuses one that FSDP 2 has sharded, and takes it once it is gathered."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import bayesprune as bp

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

X, Y = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
TAKES_ALL = {
    "prune_channels": lambda model, folder: bp.prune_channels(model, X[:1], "macs=0.5"),
    "prune_one_shot": lambda model, folder: bp.prune_one_shot(model, [X], "weights=0.5"),
    "prune_groups": lambda model, folder: bp.prune.prune_groups(model, X[:1], 2, data=[X]),
    "smallest_within": lambda model, folder: bp.prune.smallest_within(
        model, X[:1], evaluate=lambda model: 1.0, tolerance=0.1
    ),
    "fit_kronecker": lambda model, folder: bp.laplace.fit_kronecker(model, [(X, Y)]),
    "fit_laplace": lambda model, folder: bp.laplace.fit_laplace(model, [(X, Y)]),
    "compensate": lambda model, folder: bp.laplace.compensate(model, [X], {"2": [0]}),
    "quantize": lambda model, folder: bp.quantize(model, bits=4),
    "levels": lambda model, folder: bp.elastic.levels(model, X[:1], ["macs=0.5"], data=[X]),
    "certify": lambda model, folder: bp.certify(model, X, Y, 0.01, "interval"),
    "save": lambda model, folder: bp.save(model, folder / "saved"),
}


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("caller", TAKES_ALL)
@pytest.mark.parametrize("has_run", [False, True])
def test_a_sharded_model_is_refused_with_how_to_gather_it(process_group, caller, has_run, tmp_path):
    """After a forward, too, when FSDP 2 leaves the root's parameters whole."""
    model = fully_shard(bp.to_variational(net()))
    if has_run:
        model(X)
    with pytest.raises(bp.errors.UnsupportedModelError, match=f"{caller} got .* sharded .*full_state_dict=True"):
        TAKES_ALL[caller](model, tmp_path)


def test_conversion_comes_before_sharding(process_group):
    """Stds that are made afterwards belong to none of the groups that FSDP 2 gathers."""
    with pytest.raises(bp.errors.UnsupportedModelError, match="before fully_shard"):
        bp.to_variational(fully_shard(net()))


def test_what_is_gathered_is_the_model(process_group, tmp_path):
    """Stds and masks come along, and everything that was refused is served."""
    model = bp.to_variational(net())
    whole = copy.deepcopy(model)
    fully_shard(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    bp.prune_weights(model, "weights=0.75")
    bp.prune.make_masks(whole)
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    assert torch.equal(whole(X), model(X))
    for call in TAKES_ALL.values():
        call(copy.deepcopy(whole), tmp_path)


@pytest.mark.parametrize("caller", [*TAKES_ALL, "prune_weights", "to_variational", "to_deterministic", "measure"])
def test_what_is_no_model_is_told_by_who_got_it(caller, tmp_path):
    others = {
        "prune_weights": lambda model, folder: bp.prune_weights(model, "weights=0.5"),
        "to_variational": lambda model, folder: bp.to_variational(model),
        "to_deterministic": lambda model, folder: bp.to_deterministic(model),
        "measure": lambda model, folder: bp.report(model, net(), X),
    }
    with pytest.raises(TypeError, match=f"{caller} got a str in place of a model; expected a torch.nn.Module"):
        (TAKES_ALL | others)[caller]("resnet18", tmp_path)
