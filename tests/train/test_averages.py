"""Averages of weights made before masks are said; they would fail with a word about sizes, or copy wrong tensors."""

import copy
import warnings

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import bayesprune as bp
from tests.train.reference import NUM_DATA, net


def attached():
    model = net()
    return model, bp.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, num_data=NUM_DATA)


def timms(model):
    return pytest.importorskip("timm.utils").ModelEmaV3(model)


@pytest.mark.parametrize("make", [AveragedModel, timms], ids=["torch", "timm"])
def test_an_average_from_before_the_masks_is_said(make):
    model, attachment = attached()
    average = make(model)
    with pytest.warns(UserWarning, match=rf"{type(average).__name__} holds a copy .* before it had masks.*make_masks"):
        bp.prune_weights(model, "weights=0.5")
    average = make(model)
    bp.prune_weights(model, "weights=0.4")
    getattr(average, "update_parameters", getattr(average, "update", None))(model)
    assert torch.equal(average.module[5].weight_mask, model[5].weight_mask)
    assert attachment.step == 0


def test_masks_that_attach_makes_come_after_the_average():
    model = net()
    average = AveragedModel(model)
    with pytest.warns(UserWarning, match="AveragedModel holds a copy .* before it had masks"):
        bp.attach(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            num_data=NUM_DATA,
            num_steps=4,
            prune=bp.prune.PruneSchedule("weights=0.5"),
        )
    assert average is not None


def test_an_average_of_masks_is_said_when_the_first_weights_go():
    model, attachment = attached()
    bp.prune.make_masks(model)
    average = AveragedModel(model, use_buffers=True)
    with pytest.warns(UserWarning, match=r"AveragedModel\(use_buffers=True\) averages .*masks.* use_buffers=False"):
        bp.prune_weights(model, "weights=0.5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bp.prune_weights(model, "weights=0.4")
    assert average.use_buffers
    assert attachment.step == 0


@pytest.mark.parametrize("other", ["a copy", "of another model", "none attached"])
def test_other_copies_are_no_averages_of_it(other):
    model, attachment = attached()
    if other == "none attached":
        attachment.detach()
    source = torch.nn.Linear(2, 2) if other == "of another model" else model
    kept = copy.deepcopy(model) if other == "a copy" else AveragedModel(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bp.prune_weights(model, "weights=0.5")
    assert kept is not None
