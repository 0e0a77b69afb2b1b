"""Corruptions, scores and tables of what a smaller model lost."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError
from bayesprune.robustness import (
    CORRUPTIONS,
    auroc,
    calibration_error,
    corrupt,
    excess_error,
    negative_log_likelihood,
    prune_potential,
    robustness,
    typos,
)


def images(channels: int = 3, side: int = 32) -> torch.Tensor:
    """Smooth shapes with some noise, which is what corruptions change by degrees."""
    torch.manual_seed(0)
    coarse = torch.rand(4, channels, 4, 4)
    return (
        nn.functional.interpolate(coarse, (side, side), mode="bilinear") + 0.05 * torch.rand(4, 1, side, side)
    ) / 1.05


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (2, 80)])
def test_corruptions_are_seeded_keep_shape_and_range_and_grow(name, channels, side):
    x = images(channels, side)
    found = [corrupt(x, name, severity) for severity in (1, 2, 3, 4, 5)]
    for y in found:
        assert y.shape == x.shape
        assert float(y.min()) >= 0
        assert float(y.max()) <= 1
    assert torch.equal(found[1], corrupt(x, name, 2))
    distances = [float((y - x).square().mean()) for y in found]
    assert distances == sorted(distances) or name == "pixelate"
    assert 0 < distances[0] < distances[-1]
    drawn = name in ("gaussian_noise", "rotate", "shift")
    assert any(not torch.equal(found[2], corrupt(x, name, 3, seed=seed)) for seed in range(1, 9)) == drawn


def test_noise_and_contrast_have_the_published_constants():
    x = torch.full((1, 3, 64, 64), 0.5)
    assert float(corrupt(x, "gaussian_noise", 3).std()) == pytest.approx(0.08, rel=0.03)
    y = images()
    torch.testing.assert_close(corrupt(y, "contrast", 5).std((2, 3)), 0.15 * y.std((2, 3)))
    assert float(corrupt(torch.full((1, 3, 65, 65), 0.5), "gaussian_noise", 1).std()) == pytest.approx(0.08, rel=0.03)


def test_brightness_is_that_of_hsv_and_jpeg_and_pixels_are_those_of_pillow():
    x = images()
    image = Image.fromarray(x[0, 0].numpy(), mode="F")
    for severity, size in enumerate((30, 28, 27, 24, 20), start=1):
        wide = image.resize((size, size), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
        torch.testing.assert_close(corrupt(x, "pixelate", severity)[0, 0], torch.from_numpy(np.array(wide)))
    y = corrupt(x, "brightness", 2)
    torch.testing.assert_close(y.amax(1), (x.amax(1) + 0.1).clamp(max=1))
    torch.testing.assert_close(y / y.amax(1, keepdim=True), x / x.amax(1, keepdim=True))
    file = io.BytesIO()
    pixels = (x[1] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=58)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    torch.testing.assert_close(corrupt(x, "jpeg_compression", 3)[1], expected)


def test_a_shift_moves_every_pixel_by_the_same_way():
    x = torch.zeros(1, 1, 40, 40)
    x[..., 18:22, 18:22] = 1
    y = corrupt(x, "shift", 5)
    place = torch.stack([(one[0, 0].sum(1) @ torch.arange(40.0)) / one.sum() for one in (x, y)])
    across = torch.stack([(one[0, 0].sum(0) @ torch.arange(40.0)) / one.sum() for one in (x, y)])
    moved = torch.stack([place[1] - place[0], across[1] - across[0]]).norm()
    assert float(moved) == pytest.approx(0.2 * 40, rel=0.02)


def test_typos_change_about_as_many_letters_as_said_and_nothing_else():
    text = "It was the best of times, it was the worst of times; 1859. " * 60
    assert typos(text, 1) == typos(text, 1)
    assert typos(text, 1) != typos(text, 1, seed=1)
    lost = []
    for severity in (1, 3, 5):
        words = zip(text.split(), typos(text, severity).split(), strict=False)
        lost.append(sum(one != other for one, other in words))
        assert typos(text, severity).count("1859.") == 60
    assert 0 < lost[0] < lost[1] < lost[2]
    assert typos("12, 34!", 5) == "12, 34!"


def test_scores_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 1, 1])
    assert calibration_error(p, labels) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
    assert negative_log_likelihood(p, labels) == pytest.approx(-np.log([0.9, 0.1, 0.6, 0.6]).mean())
    inside, outside = torch.tensor([0.1, 0.3, 0.5]), torch.tensor([0.3, 0.6])
    assert auroc(inside, outside) == pytest.approx((1 + 0.5 + 0 + 3) / 6)
    assert prune_potential([0.9, 0.5, 0.7], [0.2, 0.1, 0.105], 0.1) == 0.7
    assert prune_potential([0.9], [0.2], 0.1) == 0.0
    assert excess_error((0.1, 0.4), (0.1, 0.3)) == pytest.approx(0.1)


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Conv2d(3, 6, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 4))


def test_models_are_measured_on_the_same_images_however_these_are_normalised():
    net = Net()
    x, y = images(), torch.tensor([0, 1, 2, 3])
    scaled = Net()
    with torch.no_grad():  # the same function of images that were moved and scaled
        weight, bias = list(scaled.parameters())[:2]
        weight /= 3
        bias += weight.sum((1, 2, 3))
    one = robustness({"a": net, "again": net}, [(x[:2], y[:2]), (x[2:], y[2:])], corruptions=["contrast"])
    assert [row.severity for row in one.rows] == [0, 1, 2, 3, 4, 5]
    assert all(row.accuracies[0] == row.accuracies[1] for row in one.rows)
    ends = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    unit = (x - ends[0]) / (ends[1] - ends[0])
    plain = robustness({"a": net}, [(unit, y)], corruptions=["contrast", "rotate"])
    other = robustness({"a": scaled}, [(3 * unit - 1, y)], corruptions=["contrast", "rotate"])
    assert plain.rows == other.rows
    assert plain.nll[0] == pytest.approx(other.nll[0], rel=1e-5)
    assert plain.errors("contrast")[0] == pytest.approx(1 - np.mean([r.accuracies[0] for r in plain.rows[1:6]]))
    assert "contrast" in str(plain)


def test_posteriors_predict_by_one_pass():
    net, x, y = Net(), images(), torch.tensor([0, 1, 2, 3])
    posterior = bp.to_variational(Net(), relative_std=0.5)
    found = robustness({"plain": net, "posterior": posterior}, [(x, y)], corruptions=[])
    expected = bp.predict(posterior, x, method="moments").classify().probabilities
    assert found.nll[1] == pytest.approx(negative_log_likelihood(expected, y))
    assert found.nll[0] == pytest.approx(negative_log_likelihood(net(x).softmax(1).detach(), y))


def test_what_does_not_fit_is_refused():
    x, y = images(), torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match="corruption is 'snow'"):
        corrupt(x, "snow", 1)
    with pytest.raises(ValueError, match="severity is 6"):
        corrupt(x, "contrast", 6)
    with pytest.raises(ValueError, match="expected floats"):
        corrupt(x[0], "contrast", 1)
    with pytest.raises(ValueError, match="no batch"):
        robustness({"a": Net()}, [])
    with pytest.raises(UnsupportedModelError, match="no images"):
        robustness({"a": Net()}, [(torch.zeros(4, 3), y)])
    with pytest.raises(UnsupportedModelError, match="no labels"):
        robustness({"a": Net()}, [x])


def test_examples_whose_label_does_not_count_are_left_out_of_the_scores():
    x, y = images(), torch.tensor([0, 1, 2, 3])
    found = robustness({"a": Net()}, [(x, torch.where(y == 1, -100, y))], corruptions=[], foreign=[x])
    expected = robustness({"a": Net()}, [(x[y != 1], y[y != 1])], corruptions=[], foreign=[x])
    assert found.rows == expected.rows
    assert found.nll == pytest.approx(expected.nll)
    assert found.ece == pytest.approx(expected.ece)
    with pytest.raises(ValueError, match="no batch with a label that counts"):
        robustness({"a": Net()}, [(x, torch.full((4,), -100))])
    with pytest.raises(ValueError, match="has the label 4, and the model has 4 outputs"):
        robustness({"a": Net()}, [(x, y + 1)])


@pytest.mark.parametrize("convert", [nn.Module.eval, bp.to_variational])
def test_a_model_without_an_output_for_each_class_is_refused(convert):
    model = convert(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1)))
    with pytest.raises(ValueError, match="expected one output for each class"):
        robustness({"a": model}, [(images(), torch.tensor([0, 1, 0, 1]))], corruptions=[])
