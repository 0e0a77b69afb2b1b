"""The paper's propagation as it is written: every covariance as a matrix, one example and one channel at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesprune.layers import VariationalLayer


def logit_moments(layers: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, C) and covariance (N, C, C) of the logits of a flat chain."""
    found = [_one(layers, image.unsqueeze(0)) for image in x]
    return torch.cat([mean for mean, _ in found]), torch.stack([covariance for _, covariance in found])


def _one(layers: nn.Sequential, mean: Tensor) -> tuple[Tensor, Tensor]:
    covariance = None  # of a map: (K, P, P); of features: (I, I)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            mean, covariance = _convolution(layer, mean, covariance)
        elif isinstance(layer, nn.Linear):
            mean, covariance = _linear(layer, mean, covariance)
        elif isinstance(layer, nn.MaxPool2d):
            channels = mean.shape[1]
            mean, chosen = F.max_pool2d(mean, layer.kernel_size, layer.stride, return_indices=True)
            rows = chosen.reshape(channels, -1)
            covariance = torch.stack([c[row][:, row] for c, row in zip(covariance, rows, strict=True)])
        elif isinstance(layer, nn.Flatten):
            mean, covariance = mean.flatten(1), torch.block_diag(*covariance)
        else:
            output = layer(mean.clone())
            slope = torch.autograd.grad(output.sum(), mean, create_graph=True)[0].reshape(covariance.shape[:-1])
            mean = output
            covariance = covariance * slope.unsqueeze(-1) * slope.unsqueeze(-2)
    return mean, covariance


def _convolution(layer, mean, covariance):
    weight, variance, bias = _posterior(layer)
    patches = F.unfold(mean, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].T
    found = variance.reshape(-1, 1, 1) * (patches @ patches.T)
    if covariance is not None:
        diagonal = covariance.diagonal(dim1=1, dim2=2).reshape(mean.shape)
        of_input = F.unfold(diagonal, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].T
        own = of_input @ weight.square().flatten(1).T + of_input.sum(1, keepdim=True) * variance
        found = found + torch.diag_embed(own.T)
    return F.conv2d(mean, weight, bias, layer.stride, layer.padding, layer.dilation), found


def _linear(layer, mean, covariance):
    weight, variance, bias = _posterior(layer)
    energy = mean.square().sum()
    found = torch.zeros(len(weight), len(weight), dtype=mean.dtype)
    if covariance is not None:
        energy = energy + covariance.trace()
        found = weight @ covariance @ weight.T
    return F.linear(mean, weight, bias), found + torch.diag(variance * energy)


def _posterior(layer):
    variance = torch.zeros(len(layer.weight), dtype=layer.weight.dtype)
    if isinstance(layer, VariationalLayer):
        variance = layer.posteriors()["weight"].std.flatten().square()
    return layer.weight, variance, layer.bias
