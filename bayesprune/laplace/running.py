"""Laplace posteriors from what training computes anyway: gradients as they come, or the state of a user's own IVON.

The training stays as it is: no noise, no KL, no second pass. A hook before each step of the user's optimizer keeps an
exponential moving average of the squared batch gradients, from which the stds follow (Khan et al., 2018, arXiv
1806.04854, have it from Adam's second moments). Under gradual removal the curvature is that of the present, partly
removed network: that of a trained network alone, whose gradients have almost vanished, says little about removing most
of its weights.

It holds an average h of curvatures for every parameter; the precision is N (h + d), with N the effective sample size
and d the weight decay (Shen et al., 2024, arXiv 2402.17641).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayesprune.foundation.text import first_names
from bayesprune.laplace.diagonal import prior_precisions, set_precision
from bayesprune.layers import Posterior, named_posteriors
from bayesprune.priors import Prior
from bayesprune.train.optimizers import grad_scaler_state, unwrapped, with_gradients


class RunningLaplace:
    """Stds from a moving average of squared gradients; `update` writes them.

    batch_size times the average stands for the Fisher information. Its bias is known: a batch gradient has variance
    Var(g) / B around its mean m, so B E[g_B^2] = Var(g) + B m^2, where the Fisher information is Var(g) + m^2. It is
    too large by (B - 1) m^2, little only where training has converged, and whatever else stands in the gradients (a KL,
    sampled weights, weight decay that is added to them) is in it too. Cost: one number a weight, and a few element-wise
    operations a step.

    Args:
        optimizer: Any torch optimizer that computes a step from one gradient, or accelerate's wrapper of one.
        model: A variational model that it trains, converted with `estimator="mean"` unless the gradients shall be those
            of sampled weights.
        num_data: Size of the training set.
        batch_size: Examples in each optimizer step, over all processes and accumulated batches.
        decay: Of the moving average, by optimizer step; 0.98 looks back some 50 steps.
        prior: A `priors.Gaussian`, whose precision is added; None is `Gaussian("layer_rms")`, of the present weights.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = bp.to_variational(torch.nn.Linear(4, 3), estimator="mean")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> posterior = bp.laplace.RunningLaplace(optimizer, model, num_data=1_000, batch_size=32)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 4)), torch.randint(3, (32,)))
        >>> loss.backward()
        >>> optimizer.step()
        >>> posterior.update()
        >>> report = bp.prune_weights(model, "weights=0.5", score=bp.prune.SNRScore(power=0.5))

    Raises:
        ValueError: a number is out of range, or the model has no variational layer.
        UnsupportedModelError: the prior has no precision of its own.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        num_data: int,
        batch_size: int,
        decay: float = 0.98,
        prior: Prior | None = None,
    ) -> None:
        if num_data < 1 or batch_size < 1 or not 0 <= decay < 1:
            raise ValueError(
                f"num_data={num_data!r}, batch_size={batch_size!r}, decay={decay!r}; expected at least one example, "
                "and a decay from 0 to below 1."
            )
        self._precisions = prior_precisions(model, prior)
        self._scale, self._decay = float(num_data) * batch_size, decay
        self._averages: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._handle = unwrapped(optimizer).register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def update(self) -> None:
        """Writes the stds of every posterior that has had a gradient, in place.

        Raises:
            RuntimeError: no optimizer step with a gradient was taken yet.
        """
        if not self._averages:
            raise RuntimeError("no step with a gradient was taken yet; expected update() after optimizer.step().")
        for posterior, precision in self._precisions.items():
            average = self._averages.get(posterior.name)
            if average is not None:
                corrected = average.double() / (1 - self._decay ** self._steps[posterior.name])
                set_precision(posterior, self._scale * corrected + precision)

    def detach(self) -> None:
        """Ends it; the stds stay as they were last written."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The averages and the numbers of their steps, by parameter name."""
        return {"averages": dict(self._averages), "steps": dict(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of a run with the same model.

        Raises:
            ValueError: the state belongs to other posteriors.
        """
        shapes = {posterior.name: posterior.mean.shape for posterior in self._precisions}
        unknown = [name for name, average in state["averages"].items() if shapes.get(name) != average.shape]
        if unknown:
            raise ValueError(
                f"the state has averages of {unknown[:5]} that the model has not, or not in this shape; expected that "
                "of a run with the same model."
            )
        self._averages = {name: average.clone() for name, average in state["averages"].items()}
        self._steps = dict(state["steps"])

    def _before_step(
        self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        return with_gradients(optimizer, args, kwargs, lambda: self._take(optimizer))

    @torch.no_grad()
    def _take(self, optimizer: Optimizer) -> None:
        scale, overflow = grad_scaler_state(optimizer)
        if overflow:
            return
        for posterior in self._precisions:
            if posterior.mean.grad is not None:
                self._add(posterior, posterior.mean.grad.float() / scale)

    def _add(self, posterior: Posterior, gradient: Tensor) -> None:
        name = posterior.name
        if name not in self._averages:
            self._averages[name], self._steps[name] = torch.zeros_like(gradient), 0
        self._averages[name].mul_(self._decay).addcmul_(gradient, gradient, value=1 - self._decay)
        self._steps[name] += 1


_KEYS = ("params", "hess", "ess", "weight_decay", "hess_init")


@torch.no_grad()
def ivon_posterior(model: nn.Module, optimizer: Optimizer) -> nn.Module:
    """The model with the stds of the posterior that the optimizer carries, in place; its means stay as they are.

    Where stds are shared (rank_one, per_channel) they are the best fit to those of single weights, see
    `bayesprune.laplace.collapse`. To follow the posterior during training, call it again, before each removal say.

    Args:
        model: A variational model whose means the optimizer trained: `to_variational` keeps the parameters, so it may
            be converted afterwards.
        optimizer: `ivon.IVON`, outside its `sampled_params`; accelerate's wrapper of one will do.

    Raises:
        TypeError: the optimizer carries no such posterior.
        ValueError: it has not trained every posterior mean of the model, has not taken a step, or its state does not
            fit its parameters.
    """
    posteriors = list(named_posteriors(model))
    if not posteriors:
        raise ValueError("the model has no variational layer; call to_variational first.")
    precisions = _precisions(unwrapped(optimizer))
    unknown = [posterior.name for posterior in posteriors if id(posterior.mean) not in precisions]
    if unknown:
        raise ValueError(
            f"ivon does not hold, or has taken no step on, {first_names(unknown)} ({len(unknown)} of the model's "
            f"{len(posteriors)} posterior means); expected the optimizer that trained them all. Leave other layers "
            "deterministic with filter_fn."
        )
    for posterior in posteriors:
        set_precision(posterior, precisions[id(posterior.mean)])
    return model


def _precisions(optimizer: Optimizer) -> dict[int, Tensor]:
    """Precisions by the id of their parameter, without those that never had a gradient.

    A group's `hess` holds the entries of all its parameters one after the other.
    """
    precisions: dict[int, Tensor] = {}
    for index, group in enumerate(optimizer.param_groups):
        missing = [key for key in _KEYS if key not in group]
        if missing:
            raise TypeError(
                f"{type(optimizer).__name__} has no {', '.join(missing)} in its parameter group {index}; expected "
                "ivon.IVON. RunningLaplace takes the gradients of any other optimizer."
            )
        parameters, hessian = group["params"], group["hess"]
        sizes = [parameter.numel() for parameter in parameters]
        if hessian.shape != (sum(sizes),):
            raise ValueError(
                f"parameter group {index} of ivon has a hess of shape {tuple(hessian.shape)} for {len(sizes)} "
                f"parameters of {sum(sizes)} entries; expected one for each. Parameters were resized since: read the "
                "posterior before channels are cut."
            )
        if not bool((hessian == group["hess_init"]).all()):  # it has stepped
            for parameter, part in zip(parameters, hessian.split(sizes), strict=True):
                if parameter.requires_grad:
                    precisions[id(parameter)] = group["ess"] * (part.view_as(parameter) + group["weight_decay"])
    return precisions
