"""A module passed by samples: where its functions have no rules, or where its own rules are too rough.

The named modules get K draws of their inputs, and of the weights of the variational layers in them, and run as plain
modules; mean and variance of what they return go on. Within one pass every other module keeps its rules.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from bayesprune.foundation import noise
from bayesprune.moments.covariance import aligned, shared_dims
from bayesprune.moments.gaussian import std
from bayesprune.moments.memory import KnownMoments
from bayesprune.moments.settings import current
from bayesprune.moments.tensor import Moments, known, plain

_DRAWING: ContextVar[bool] = ContextVar("bayesprune_moments_drawing", default=False)


def is_drawing() -> bool:
    """Whether a module is being run at draws now, so that its layers draw weights and return plain tensors."""
    return _DRAWING.get()


@contextmanager
def sampled(
    model: nn.Module, *kinds: type[nn.Module] | str, num_samples: int = 32, seed: int | None = 0
) -> Iterator[list[str]]:
    """Inside, moments pass these modules of the model by samples.

    A variance has a relative standard error of about sqrt(2 / num_samples). With `settings(covariance="shared")` what
    positions share is measured along the dimensions along which an input shares; with "low_rank", the result follows
    the directions of the inputs by regression and the rest is its residual. Not for `compile_moments`, whose programs
    would hold one set of draws for good.

    Args:
        model: The model whose forward is run inside.
        *kinds: Types of modules, names of their classes, or names of modules.
        num_samples: Draws K, at least 2; the module runs as often.
        seed: The same draws at every pass; None is torch's generator, as training wants it.

    Yields:
        The names of the modules, the outermost of nested ones.

    Examples:
        >>> import warnings
        >>> import torch
        >>> import bayesprune as bp
        >>> model = bp.to_variational(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()))
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     with bp.moments.sampled(model, torch.nn.Tanh, num_samples=8) as names:
        ...         prediction = bp.predict(model, torch.randn(5, 3), method="moments")
        >>> names
        ['1']

    Raises:
        ValueError: no module is meant, or fewer than two samples were asked for.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}; a variance needs at least 2.")
    chosen = dict[str, nn.Module]()
    for name, module in model.named_modules():
        is_meant = any(_is(module, name, kind) for kind in kinds)
        if is_meant and not any(name.startswith(f"{outer}.") or not outer for outer in chosen):
            chosen[name] = module
    if not chosen:
        types = sorted({type(module).__name__ for module in model.modules()})
        asked = ", ".join(kind if isinstance(kind, str) else kind.__name__ for kind in kinds) or "nothing"
        raise ValueError(f"sampled got {asked}, which no module of the model is; its types are {', '.join(types)}.")
    listed = ", ".join(f"{name or '(root)'} ({type(module).__name__})" for name, module in chosen.items())
    warnings.warn(
        f"moments pass {listed} by {num_samples} samples: their variance has a relative error of about "
        f"{(2 / num_samples) ** 0.5:.0%}.",
        stacklevel=3,
    )
    before = {name: module.__dict__.get("forward") for name, module in chosen.items()}
    try:
        for module in chosen.values():
            module.forward = _by_samples(module.forward, num_samples, seed)
        yield list(chosen)
    finally:
        for name, module in chosen.items():
            del module.forward
            if (own := before[name]) is not None:
                module.forward = own


def _is(module: nn.Module, name: str, kind: type[nn.Module] | str) -> bool:
    if isinstance(kind, str):
        return kind == name or any(kind == base.__name__ for base in type(module).__mro__)
    return isinstance(module, kind)


def _by_samples(forward: Callable[..., Any], num_samples: int, seed: int | None) -> Callable[..., Any]:
    def sampled_forward(*args: Any, **kwargs: Any) -> Any:
        if is_drawing():
            return forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        inputs = [known(leaf) if isinstance(leaf, Moments) else None for leaf in leaves]
        device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
        devices = [device] if device.type == "cuda" else []
        token = _DRAWING.set(True)
        try:
            with torch.random.fork_rng(devices) if seed is not None else nullcontext():
                if seed is not None:
                    torch.manual_seed(seed)
                weights = _weights(inputs, num_samples)
                runs = [_run(forward, leaves, inputs, spec, weights, i) for i in range(num_samples)]
        finally:
            _DRAWING.reset(token)
        results = [tree_flatten(run) for run in runs]
        columns = zip(*(flat for flat, _ in results), strict=True)
        return tree_unflatten([_moments(list(column), inputs, weights) for column in columns], results[0][1])

    return sampled_forward


def _weights(inputs: list[KnownMoments | None], num_samples: int) -> Tensor | None:
    """How far each draw goes along each of the K directions that the inputs have in common: (S, K)."""
    found = next((x.directions for x in inputs if x is not None and x.directions is not None), None)
    if found is None:
        return None
    drawn = noise.normal((num_samples, len(found)), device=found.device, dtype=found.dtype)
    drawn = drawn - drawn.mean(0)
    return drawn / drawn.square().mean(0).sqrt()


def _run(
    forward: Callable[..., Any],
    leaves: list[Any],
    inputs: list[KnownMoments | None],
    spec: Any,
    weights: Tensor | None,
    i: int,
) -> Any:
    drawn = [leaf if x is None else _draw(x, weights, i) for leaf, x in zip(leaves, inputs, strict=True)]
    args, kwargs = tree_unflatten(drawn, spec)
    return forward(*args, **kwargs)


def _draw(x: KnownMoments, weights: Tensor | None, i: int) -> Tensor:
    (mean, variance, shared), directions, residual = x
    if variance is None:
        return mean
    draw, alone = mean.to(variance.dtype), variance if directions is None else residual
    if directions is not None:
        assert weights is not None, "directions have their weights"
        draw = draw + torch.tensordot(weights[i], directions, 1)
    elif shared is not None:
        alone = (variance - shared).clamp_min(0)
        draw = draw + std(shared.clamp_min(0)) * _normal(shared)
    if alone is not None:
        draw = draw + std(alone) * _normal(alone)
    return draw.to(mean.dtype)


def _normal(like: Tensor) -> Tensor:
    return noise.normal(like.shape, device=like.device, dtype=like.dtype)


def _moments(column: list[Any], inputs: list[KnownMoments | None], weights: Tensor | None) -> Any:
    """What the draws of one result say; what is no floating-point tensor is the same at all of them."""
    first = column[0]
    if not isinstance(first, Tensor) or not first.is_floating_point():
        same = all(torch.equal(first, other) if isinstance(first, Tensor) else first == other for other in column[1:])
        if not same:
            raise TypeError(
                f"a module that moments pass by samples returned a {type(first).__name__} that differs from draw to "
                "draw and is no floating-point tensor; pass the module around it by samples instead."
            )
        return first
    dtype = torch.promote_types(first.dtype, torch.float32)
    values = torch.stack([plain(value).to(dtype) for value in column])
    mean, count = values.mean(0), len(values)
    deviations = values - mean
    variance = deviations.square().sum(0) / (count - 1)
    mean = mean.to(first.dtype)
    if weights is not None:
        directions = torch.tensordot(weights.to(dtype).T, deviations, 1) / count
        return Moments.along(mean, directions, (variance - directions.square().sum(0)).clamp_min(0))
    return Moments(mean, variance, _shared(deviations, variance, inputs))


def _shared(deviations: Tensor, variance: Tensor, inputs: list[KnownMoments | None]) -> Tensor | None:
    """The mean covariance of two positions, along the dimensions along which an input shares."""
    if current().covariance != "shared":
        return None
    along = set[int]().union(*(shared_dims(x.parts) for x in inputs if x is not None))
    dims = [d for d in sorted(along) if -d <= variance.dim() and variance.shape[d] > 1]
    if not dims:
        return None
    pairs = torch.Size(variance.shape[d] for d in dims).numel()
    whole = deviations.sum(dims, keepdim=True).square().sum(0) / (len(deviations) - 1)
    common = (whole - variance.sum(dims, keepdim=True)) / (pairs * (pairs - 1))
    return aligned(common.clamp_min(0), variance.dim()).minimum(variance.mean(dims, keepdim=True))
