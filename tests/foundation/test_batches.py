"""One reading of batches: what a forward gets of each form, and that all who take data read them so."""

import copy
from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import bayesprune as bp
from bayesprune.foundation.batches import given, on_device, split
from bayesprune.prune import recalibrate_batch_norm
from bayesprune.reports import Metric, accuracy, measure

A, B, Y = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
IMAGES, TARGETS = [torch.rand(3, 8, 8), torch.rand(3, 6, 8)], [{"boxes": torch.rand(1, 4)}, {"boxes": torch.rand(2, 4)}]
Pair = namedtuple("Pair", "x y")


def model(forward) -> nn.Module:
    return type("Model", (nn.Module,), {"forward": forward})()


def one(self, x): ...
def one_or_two(self, x, mask=None): ...
def two(self, a, b): ...
def own_loss(self, x, labels): ...
def any_number(self, *args, **kwargs): ...
def by_name(self, input_ids=None, attention_mask=None, labels=None): ...
def by_any_name(self, input_ids=None, **kwargs): ...
def seq2seq(self, input_ids=None, decoder_input_ids=None, labels=None): ...
def detector(self, images, targets=None): ...
def features(self, x: list[torch.Tensor]): ...


CASES = {
    "inputs alone": (one, A, (A,), {}, None),
    "inputs alone in a tuple": (one, (A,), (A,), {}, None),
    "inputs and target": (one, (A, Y), (A,), {}, Y),
    "a list, as a DataLoader makes": (one, [A, Y], (A,), {}, Y),
    "and an index of the example": (one, (A, Y, B), (A,), {}, Y),
    "a named tuple": (one, Pair(A, Y), (A,), {}, Y),
    "two inputs and a target": (two, (A, B, Y), (A, B), {}, Y),
    "two inputs alone": (two, (A, B), (A, B), {}, None),
    "two inputs together": (two, ((A, B), Y), (A, B), {}, Y),
    "two inputs together, in lists": (two, [[A, B], Y], (A, B), {}, Y),
    "an input that may be left out": (one_or_two, (A, B, Y), (A, B), {}, Y),
    "left out": (one_or_two, (A, Y), (A,), {}, Y),
    "a forward that needs its labels": (own_loss, (A, Y), (A, Y), {}, None),
    "by key, and needs its labels": (own_loss, {"x": A, "labels": Y}, (), {"x": A, "labels": Y}, Y),
    "no signature to go by": (any_number, (A, B, Y), (A, B), {}, Y),
    "a mapping": (by_name, {"input_ids": A, "labels": Y}, (), {"input_ids": A}, Y),
    "a mapping and a target": (by_name, ({"input_ids": A}, Y), (), {"input_ids": A}, Y),
    "a mapping of another type": (by_name, UserDict(input_ids=A, label=Y), (), {"input_ids": A}, Y),
    "columns that are no arguments": (by_name, {"input_ids": A, "text": ["a"], "index": B}, (), {"input_ids": A}, None),
    "any keys, texts apart": (by_any_name, {"input_ids": A, "text": ["a"], "b": B}, (), {"input_ids": A, "b": B}, None),
    "labels that a decoder starts from": (seq2seq, {"input_ids": A, "labels": Y}, (), {"input_ids": A, "labels": Y}, Y),
    "one tensor under another name": (one, {"image": A, "label": Y}, (A,), {}, Y),
    "images and targets": (detector, (IMAGES, TARGETS), (IMAGES,), {}, TARGETS),
    "images and targets in tuples": (detector, (tuple(IMAGES), tuple(TARGETS)), (IMAGES,), {}, tuple(TARGETS)),
    "images alone": (detector, IMAGES, (IMAGES,), {}, None),
    "images of a model of one's own": (one, (IMAGES, TARGETS), (IMAGES,), {}, TARGETS),
    "a list by its annotation": (features, [[A, B], Y], ([A, B],), {}, Y),
}


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one is other
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("name", CASES)
def test_what_a_forward_gets_of_a_batch(name):
    forward, batch, args, kwargs, labels = CASES[name]
    found = split(model(forward), batch)
    assert equal(found.args, args)
    assert equal(found.kwargs, kwargs)
    assert equal(found.labels, labels)
    assert found.num_examples == (2 if "images" in name else 4)


def test_a_mapping_that_the_forward_wants_whole():
    batch = {"image": A, "depth": B, "label": Y}
    assert split(model(one), batch).args == (batch,)


def test_what_cannot_be_read_is_said():
    with pytest.raises(ValueError, match="a batch has 'x', 'depth', and the forward of Model takes a, b; expected"):
        split(model(two), {"x": A, "depth": B})
    with pytest.raises(ValueError, match="a batch is empty"):
        split(model(one), ())
    with pytest.raises(TypeError, match="the inputs are a NoneType; expected a tensor"):
        bp.prune_channels(bp.to_variational(nn.Sequential(nn.Linear(2, 2))), None, target="macs=0.5")


def test_example_inputs_have_no_labels():
    assert given(model(two), (A, B)).args == (A, B)
    assert given(model(one_or_two), [A, B]).args == (A, B)
    assert given(model(detector), IMAGES).args == (IMAGES,)
    assert given(model(detector), (IMAGES, TARGETS)).args == (IMAGES, TARGETS)
    assert given(model(by_name), {"input_ids": A, "labels": Y}).kwargs.keys() == {"input_ids", "labels"}


def test_tensors_move_wherever_they_are():
    batch = {"a": [A, (B, "text")], "b": Pair(A, {"c": 3}), "packed": pack_sequence([A, B])}
    moved = on_device(batch, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].is_meta
    assert moved["a"][1][1] == "text"
    assert type(moved["b"]) is Pair
    assert moved["b"].x.is_meta
    assert isinstance(moved["packed"], PackedSequence)
    assert moved["packed"].data.is_meta
    assert not A.is_meta


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.norm = nn.Linear(3, 5), nn.Linear(3, 5), nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, a, b):
        return {"logits": self.head(self.norm(self.left(a) * self.right(b)).relu())}


FORMS = {
    "flat": (A, B, Y),
    "mapping": {"a": A, "b": B, "labels": Y},
    "mapping in a tuple": ({"a": A, "b": B}, Y),
    "default_collate": [[A, B], Y],
}


@pytest.mark.parametrize("form", FORMS)
def test_all_who_take_data_read_every_form(form):
    stds, statistics, scores = [], [], []
    for batch in (((A, B), Y), FORMS[form]):
        net = bp.to_variational(TwoInputs())
        torch.manual_seed(1)
        bp.laplace.fit_laplace(net, [batch], loss=bp.laplace.cross_entropy)
        bp.laplace.fit_laplace(net, [batch])
        bp.laplace.set_marginal_stds(net, bp.laplace.fit_kronecker(net, [batch]))
        stds.append(net.left.weight_log_std.detach())
        bp.prune_weights(net, "weights=0.5", data=[batch])
        statistics.append(recalibrate_batch_norm(net, [batch]).norm.running_mean)
        scores.append(accuracy(net, [batch]))
    assert torch.equal(*stds)
    assert torch.equal(*statistics)
    assert scores[0] == scores[1]


def test_a_batch_without_examples_says_nothing():
    def changed(batches):
        torch.manual_seed(1)
        net = bp.to_variational(TwoInputs())
        bp.laplace.fit_laplace(net, batches)
        bp.laplace.set_marginal_stds(net, bp.laplace.fit_kronecker(net, batches))
        bp.prune_one_shot(net, batches, "weights=0.5")
        bp.prune_channels(net, (A, B), {"left": 3}, data=batches)
        bp.quantize(net, batches, tolerance=0.1)
        recalibrate_batch_norm(net, batches)
        return net.state_dict()

    full, empty = ((A, B), Y), ((A[:0], B[:0]), Y[:0])
    expected = changed([full])
    for batches in ([full, empty], [empty, full]):
        found = changed(batches)
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    with pytest.raises(ValueError, match="no batch"):
        bp.laplace.fit_laplace(bp.to_variational(TwoInputs()), [empty])


def test_labels_that_are_no_tensor_are_said():
    net = bp.to_variational(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="the labels of a batch are NoneType; expected a tensor"):
        accuracy(net, [A])
    with pytest.raises(ValueError, match="the labels of a batch are list; expected a tensor of class numbers"):
        bp.laplace.fit_laplace(net, [(A, ["cat"])], loss=bp.laplace.cross_entropy)


def fcos() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    trunk = ResNet(BasicBlock, [1, 1, 1, 1])
    backbone = BackboneWithFPN(trunk, {"layer1": "0", "layer2": "1"}, [64, 128], 32)
    anchors = detection.anchor_utils.AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    return detection.FCOS(backbone, 3, min_size=32, max_size=48, anchor_generator=anchors, score_thresh=0.1).eval()


def test_a_detector_is_measured_reported_and_recalibrated():
    model, images = fcos(), [torch.rand(3, 32, 40), torch.rand(3, 24, 32)]
    batches = [(images, [{"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1])}] * 2)]

    def boxes(detector: nn.Module) -> float:
        return float(sum(len(found["boxes"]) for found in detector(images)))

    before = measure(model, images, evaluate=boxes, num_repeats=1)
    assert before.batch == 2
    assert before.macs > 0
    norm = model.backbone.body.bn1
    statistics = norm.running_mean.clone()
    removed = bp.prune_weights(bp.to_variational(model), "weights=0.5", data=batches)
    assert removed.removable.sparsity == pytest.approx(0.5, abs=1e-4)
    assert not torch.equal(norm.running_mean, statistics)
    found = bp.report(before, model, images, evaluate=boxes, metric=Metric("boxes"), num_repeats=1)
    assert "boxes" in str(found)
    assert found.after.nonzero_parameters < before.nonzero_parameters


NET = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
TAKERS = {
    "prune_channels": lambda data: bp.prune_channels(bp.to_variational(NET), A, "macs=0.5", data=data),
    "prune_weights": lambda data: bp.prune_weights(bp.to_variational(NET), "weights=0.5", data=data),
    "prune_one_shot": lambda data: bp.prune_one_shot(bp.to_variational(NET), data, "weights=0.5"),
    "quantize": lambda data: bp.quantize(NET, data, bits=4),
    "levels": lambda data: bp.elastic.levels(NET, A, ["macs=0.5"], data=data),
    "fit_laplace": lambda data: bp.laplace.fit_laplace(bp.to_variational(NET), data),
    "fit_kronecker": lambda data: bp.laplace.fit_kronecker(bp.to_variational(NET), data),
    "accuracy": lambda data: accuracy(NET, data),
    "perplexity": lambda data: bp.reports.perplexity(NET, data),
    "robustness": lambda data: bp.robustness.robustness({"net": NET}, data),
}


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("data", [A, {"x": A, "labels": Y}, "images", 5], ids=["tensor", "mapping", "text", "number"])
def test_a_single_batch_in_place_of_batches_is_told_by_all_who_take_data(name, data):
    before = copy.deepcopy(NET.state_dict())
    with pytest.raises(
        TypeError, match=r" is a \w+; expected batches: a DataLoader, or a list such as \[\(inputs, labels"
    ):
        TAKERS[name](data)
    bp.to_deterministic(NET)
    assert all(torch.equal(value, before[key]) for key, value in NET.state_dict().items())
