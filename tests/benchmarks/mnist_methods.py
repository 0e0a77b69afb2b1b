"""Training, scores and removal for the MNIST tables: one code for networks with posteriors and for plain ones."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.layers import Posterior, VariationalLayer, named_posteriors, variational_layers
from bayesprune.prune.scores.weights import magnitude, snr

Score = Callable[[Posterior], Tensor]
BATCH = 256


@dataclass(frozen=True)
class Data:
    """Images (N, 28, 28) in 0 to 1 and labels (N), all in memory."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Phase:
    """One training with Adam.

    Attributes:
        epochs: Its length.
        lr: Learning rate of the means at the start.
        end: What is left of it at the end, reached linearly.
        temperature: Weight of the KL.
        ramp: Share of the phase over which that weight rises from zero.
        std_lr: Learning rate of the log stds.
        shift: Each batch is moved by up to so many pixels in each direction.
    """

    epochs: float
    lr: float
    end: float = 0.0
    temperature: float = 1.0
    ramp: float = 0.0
    std_lr: float = 1e-3
    shift: int = 0


@dataclass
class Network:
    """A stack of linear and convolution layers; it shrinks as units lose their weights.

    Attributes:
        model: The layers that are left, converted; a plain network's estimator is "mean".
        prior: None for a plain network.
        total: Number of weights at the start.
        inputs: Pixels that are left of 784; None for a network that reads whole images.
    """

    model: nn.Sequential
    prior: bp.priors.Prior | None
    total: int
    inputs: Tensor | None
    penalty: Callable[["Network"], None] | None = None
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    observes: bool = False

    @property
    def layers(self) -> list[VariationalLayer]:
        return [layer for _, layer in variational_layers(self.model)]

    def see(self, images: Tensor) -> Tensor:
        """Images (B, 28, 28) as the first layer takes them."""
        if self.inputs is None:
            return images.unsqueeze(1)
        return images.flatten(1).index_select(1, self.inputs)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def lenet5() -> nn.Sequential:
    """LeNet-5 of Caffe: 20 and 50 filters, 800 inputs to 500 units."""
    convolutions = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.ReLU()]
    layers = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))
    return layers.to(memory_format=torch.channels_last)  # which takes two thirds of the time


def network(layers: nn.Sequential, *, prior: bp.priors.Prior | None, std: str = "per_weight") -> Network:
    """The network with posteriors, or without where there is no prior."""
    estimator = "mean" if prior is None else "auto"
    model = bp.to_variational(layers, std=std, estimator=estimator)
    total = sum(p.mean.numel() for p in named_posteriors(model) if p.is_weight)
    return Network(model, prior, total, torch.arange(784) if isinstance(layers[0], nn.Linear) else None)


def without_posterior(net: Network) -> Network:
    """A copy that trains on at its means, without noise, penalty or cuts."""
    done = copy.deepcopy(net)
    done.prior, done.penalty, done.observes = None, None, False
    for layer in done.layers:
        layer.estimator = "mean"
    return done


def train(net: Network, data: Data, phase: Phase, *, cut: Callable[[float], None] | None = None, cuts: int = 0) -> int:
    """Trains in place; `cut` is called with the share of the phase that is done, `cuts` times. Returns the steps."""
    per_epoch = len(data.labels) // BATCH
    num_steps = round(phase.epochs * per_epoch)
    means = [p for name, p in net.model.named_parameters() if not name.endswith(("log_std", "gate.logits"))]
    optimizer = torch.optim.Adam(means, lr=phase.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - (1 - phase.end) * step / num_steps)
    if net.prior is not None:
        bp.attach(
            optimizer,
            net.model,
            num_data=len(data.labels),
            prior=net.prior,
            temperature=phase.temperature,
            num_steps=num_steps,
            warmup=phase.ramp,
            std_lr=phase.std_lr,
            max_noise_cost=None,
        )
    net.model.train()
    at = {round((k + 1) * num_steps / cuts): (k + 1) / cuts for k in range(cuts)}
    for step, chosen in enumerate(_batches(len(data.labels), num_steps), 1):
        images = net.see(_shifted(data.images[chosen], phase.shift))
        loss = F.cross_entropy(net.model(images), data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        if net.observes:
            observe(net)
        if net.penalty is not None:
            net.penalty(net)
        optimizer.step()
        schedule.step()
        if cut is not None and step in at:
            cut(at[step])
            net.gradients.clear()
    return num_steps


@torch.no_grad()
def observe(net: Network) -> None:
    """Adds |w g| and g^2 of this step's gradient g to the sums since the last cut: no pass of its own."""
    for posterior in named_posteriors(net.model):
        if posterior.is_weight:
            gradient = posterior.mean.grad
            assert gradient is not None
            if posterior.name not in net.gradients:
                net.gradients[posterior.name] = [torch.zeros_like(gradient), torch.zeros_like(gradient)]
            first, second = net.gradients[posterior.name]
            first.add_((gradient * posterior.mean).abs_())
            second.addcmul_(gradient, gradient)


def l1(weight: float) -> Callable[[Network], None]:
    """Adds the gradient of `weight` times the sum of |w|."""

    @torch.no_grad()
    def penalty(net: Network) -> None:
        for layer in net.layers:
            layer.weight.grad.add_(layer.weight.sign(), alpha=weight)  # type: ignore[union-attr]

    return penalty


def group_lasso(weight: float) -> Callable[[Network], None]:
    """Adds the gradient of `weight` times the norms of every layer's rows (filters) and columns (inputs)."""

    @torch.no_grad()
    def penalty(net: Network) -> None:
        for layer in net.layers:
            w = layer.weight
            rows = w.square().sum(tuple(range(1, w.dim())), keepdim=True).sqrt().clamp_min(1e-8)
            columns = w.square().sum((0, *range(2, w.dim())), keepdim=True).sqrt().clamp_min(1e-8)
            w.grad.add_(w / rows + w / columns, alpha=weight)  # type: ignore[union-attr]

    return penalty


def weight_score(method: str, net: Network, *, by_units: bool) -> Score:
    """What a method scores weights by, the lowest going first; `by_units`, what it sums over the weights of a unit."""

    def random(posterior: Posterior) -> Tensor:
        return torch.rand_like(posterior.mean)

    def squares(posterior: Posterior) -> Tensor:
        return posterior.mean.detach().square()

    def nats(posterior: Posterior) -> Tensor:
        """The KL under ARD per weight, 1/2 ln(1 + SNR^2): what the description gets shorter by."""
        return 0.5 * snr(posterior).square().log1p()

    def lamp(posterior: Posterior) -> Tensor:
        """Lee et al., 2021: w^2 over the sum of the squares in the layer that are not smaller."""
        flat = squares(posterior).double().flatten()
        values, order = flat.sort()
        not_smaller = values.flip(0).cumsum(0).flip(0).clamp_min(1e-300)
        return torch.empty_like(flat).scatter_(0, order, values / not_smaller).view(posterior.mean.shape)

    def taylor(posterior: Posterior) -> Tensor:
        return net.gradients[posterior.name][0]

    def obd(posterior: Posterior) -> Tensor:
        return squares(posterior) * net.gradients[posterior.name][1]

    norm = squares if by_units else magnitude
    posterior_score = nats if by_units else snr
    scores = {"magnitude": norm, "L1": norm, "random": random, "lamp": lamp}
    return {**scores, "taylor": taylor, "obd": obd}.get(method, posterior_score)


def num_kept(net: Network) -> int:
    """How many weights are kept."""
    return sum(int(mask_of(layer).sum()) for layer in net.layers)


def keep_weights(net: Network, count: int, score: Score) -> None:
    """Removes single weights until `count` are kept."""
    numel = sum(layer.weight.numel() for layer in net.layers)
    if count < numel:
        bp.prune_weights(net.model, f"weights={count / numel}", score=score)


def mask_of(layer: VariationalLayer) -> Tensor:
    mask = layer.mask("weight")
    return torch.ones_like(layer.weight, dtype=torch.bool) if mask is None else mask.clone()


def _batches(number: int, num_steps: int) -> Iterator[Tensor]:
    while True:
        for chosen in torch.randperm(number).split(BATCH)[: number // BATCH]:
            if num_steps == 0:
                return
            num_steps -= 1
            yield chosen


def _shifted(images: Tensor, shift: int) -> Tensor:
    """The batch moved by up to `shift` pixels in each direction, zeros at the border."""
    if not shift:
        return images
    x, y = torch.randint(0, 2 * shift + 1, (2,)).tolist()
    return F.pad(images, (shift,) * 4)[:, y : y + 28, x : x + 28]
