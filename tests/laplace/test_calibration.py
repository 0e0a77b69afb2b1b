from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError
from bayesprune.laplace import cross_entropy, output_metric, sampled_cross_entropy
from bayesprune.laplace.calibration import record


def net() -> nn.Module:
    layers = nn.Linear(4, 6), nn.ReLU(inplace=True), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
    return bp.to_variational(nn.Sequential(*layers)).double()


def batches(count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))) for _ in range(count)]


def test_gradients_are_those_of_each_examples_loss_at_the_output_before_an_activation_in_place():
    model, (batch,) = net().train(), batches(1)
    found = next(record(model, [batch], loss=cross_entropy)).calls["0"][0]
    model.eval()
    for index, (x, label) in enumerate(zip(*batch, strict=True)):
        output = model[0](x[None]).detach().requires_grad_()
        F.cross_entropy(model[4](model[2](output.relu())), label[None]).backward()
        torch.testing.assert_close(found.gradients[index], output.grad[0])
    assert torch.equal(found.inputs, batch[0])


def test_the_model_is_left_as_it_was():
    model = net().train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert [batch.num_examples for batch in record(model, batches(3), num_batches=2)] == [5, 5]
    assert [module.training for module in model] == [True, True, False, True, True]
    assert not model[0].weight.requires_grad
    assert model[4].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sampled_labels_are_the_models_own_and_need_no_others():
    model = bp.to_variational(nn.Linear(1, 3))
    model.weight.data.zero_()
    model.bias.data = torch.tensor([0.0, 1.0, 2.0])
    count = 20_000
    gradients = next(record(model, [(torch.zeros(count, 1), "no labels")], loss=sampled_cross_entropy)).calls[""][0]
    p = model.bias.detach().softmax(0)
    label = (p - gradients.gradients).argmax(1)
    share = label.bincount(minlength=3) / count
    z = (share - p).abs() / (p * (1 - p) / count).sqrt()
    assert z.max() < 5, f"z = {z.tolist()}"


def test_mappings_run_as_keywords():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return SimpleNamespace(logits=self.linear(input=x))

    model, ((x, labels),) = bp.to_variational(Classifier()).double(), batches(1)
    expected = next(record(model.linear, [(x, labels)], loss=cross_entropy)).calls[""][0]
    found = next(record(model, [{"x": x, "labels": labels}], loss=cross_entropy)).calls["linear"][0]
    assert torch.equal(found.gradients, expected.gradients)
    assert next(record(model, [{"x": x, "labels": labels}])).calls["linear"][0].gradients.shape == (5, 3)
    with pytest.raises(ValueError, match=r"gives \(1, 5, 3\) logits; expected \(examples, classes\)"):
        next(record(model, [{"x": x[None], "labels": labels[None]}], loss=cross_entropy))


def test_refuses_what_it_cannot_tell_apart():
    with pytest.raises(ValueError, match="has no batch"):
        list(record(net(), []))

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = bp.to_variational(nn.Linear(4, 3))

        def forward(self, x):
            return self.linear(x.transpose(0, 1)).sum(0)

    with pytest.raises(UnsupportedModelError, match=r"linear has inputs of shape \(3, 5, 4\) in a batch of 5"):
        list(record(TimeFirst(), [(torch.randn(5, 3, 4), torch.randint(3, (5,)))]))


@pytest.mark.parametrize(
    "read",
    [torch.Tensor.item, str, lambda value: (value, value), lambda value: value.detach(), lambda value: value.repeat(2)],
)
def test_a_loss_without_a_gradient_is_told(read):
    batches = [(torch.randn(6, 3), torch.randint(2, (6,)))]
    model = bp.to_variational(nn.Linear(3, 2))
    with pytest.raises(TypeError, match=r"loss returned .*; expected a tensor of one number that has a gradient"):
        bp.laplace.fit_laplace(model, batches, loss=lambda *of: read(bp.laplace.cross_entropy(*of)))


def test_a_single_logit_is_refused_by_losses_of_classes_and_has_a_metric():
    model, batch = bp.to_variational(nn.Linear(4, 1)), (torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    for loss in (None, sampled_cross_entropy, cross_entropy):
        with pytest.raises(ValueError, match="one logit for each prediction.*Pass loss="):
            bp.laplace.fit_laplace(model, [batch], loss=loss)
    assert next(record(model, [batch], loss=output_metric)).calls[""][0].gradients.abs().min() > 0
