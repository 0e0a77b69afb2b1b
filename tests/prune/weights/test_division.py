import math

import pytest
import torch
from torch import nn

from bayesprune.prune.weights.one_shot import divergence, divide, levels


def costs(scale: float, rate: float, sparsity: float) -> tuple[float, float]:
    low, high = levels(sparsity)
    return scale * math.exp(rate * low), scale * math.exp(rate * high)


def test_one_more_weight_costs_the_same_in_every_layer():
    sizes, scales, rates = [100, 400, 200], [0.01, 0.02, 0.03], [6.0, 7.0, 5.0]
    measured = [costs(scale, rate, 0.5) for scale, rate in zip(scales, rates, strict=True)]
    shares = divide(0.5, sizes, measured, [0, 0, 0])
    assert sum(share * size for share, size in zip(shares, sizes, strict=True)) == pytest.approx(350)
    prices = [
        scale * rate * math.exp(rate * share) / size
        for scale, rate, share, size in zip(scales, rates, shares, sizes, strict=True)
    ]
    assert prices == pytest.approx([prices[0]] * 3)
    assert all(abs(share - 0.5) < 0.2 for share in shares), "no bound was met"


def test_no_layer_goes_far_nor_below_what_it_has_lost():
    measured = [(1e-6, 2e-6), (1.0, 2.0), (0.5, 1.0)]
    assert divide(0.5, [100, 100, 100], measured, [0, 0, 0])[0] == pytest.approx(0.7)
    assert divide(0.5, [100, 100, 100], measured, [0, 0.45, 0])[1] >= 0.45
    assert divide(0.9, [100, 100, 100], measured, [0, 0, 0])[0] == pytest.approx(0.95)


@pytest.mark.parametrize("measured", [[(0.0, 0.0)] * 2, [(-0.1, -0.2), (-0.1, -0.2)]])
def test_without_a_difference_all_lose_alike(measured):
    assert divide(0.6, [50, 50], measured, [0, 0]) == pytest.approx([0.6, 0.6])


def test_a_cost_that_noise_made_negative_counts_as_small():
    first, second = divide(0.5, [100, 100], [(-0.1, -0.05), (0.1, 0.2)], [0, 0])
    assert first > 0.5 > second


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 7)

    def forward(self, input_ids, attention_mask):
        return {"logits": self.table(input_ids)}


def test_predictions_are_compared_where_the_attention_mask_counts():
    torch.manual_seed(0)
    model = Words()
    ids, mask = torch.tensor([[0, 1, 2], [3, 4, 6]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    measure = divergence(model, [{"input_ids": ids, "attention_mask": mask}])
    before = model.table.weight.log_softmax(1).detach()
    assert measure(model) == 0
    model.table.weight.data[6] = 5 * torch.randn(7)
    assert measure(model) == 0, "the position of token 6 does not count"
    model.table.weight.data[2] = torch.randn(7)
    after = model.table.weight.log_softmax(1).detach()
    expected = (before[2].exp() * (before[2] - after[2])).sum() / 5
    assert measure(model) == pytest.approx(float(expected), rel=1e-5)


def test_images_of_classes_are_compared_by_pixel():
    torch.manual_seed(0)
    model, x = nn.Conv2d(2, 3, 1), torch.randn(2, 2, 4, 4)
    before = model(x).log_softmax(1).detach()
    measure = divergence(model, [x])
    model.weight.data.mul_(2)
    after = model(x).log_softmax(1).detach()
    assert measure(model) == pytest.approx(float((before.exp() * (before - after)).sum(1).mean()), rel=1e-4)
