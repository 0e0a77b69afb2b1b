"""Modules that take part in training alone, such as gates: the hook by which the core serves rooms it does not import.

A side room puts auxiliary modules into a model. Conversion, pruning, saving and training ask the model for them, and
leave to the room of the modules what is to be done.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

from torch import nn

_P = ParamSpec("_P")
_R = TypeVar("_R")


class SideRoom(ABC):
    """What a room does for all its auxiliary modules of a model."""

    @abstractmethod
    def fold(self, model: nn.Module, lost: Mapping[str, Collection[int]]) -> None:
        """Puts what the modules decide into the model's weights, in place; the modules stay.

        Args:
            model: With modules of the room.
            lost: Input channels that each layer is about to lose, by the layer's name: their zeros get no mask.
        """

    @abstractmethod
    def drop(self, model: nn.Module) -> None:
        """Removes the modules and their hooks, whatever they decide."""

    @abstractmethod
    def complexity(self, model: nn.Module) -> Any:
        """The `bayesprune.train.complexity.Complexity` of the model, which trains the modules."""

    @abstractmethod
    def importance(self, model: nn.Module, kind: str) -> Any:
        """What ranks the model's channels for a target of this kind; None where the modules say nothing of it."""


class Auxiliary(nn.Module):
    """A module that is in a model for its training alone.

    Attributes:
        room: The room that it is of.
        passes: Whether the model computes for the time being as if it were not there.
    """

    room: ClassVar[SideRoom]

    def __init__(self) -> None:
        super().__init__()
        self.passes = False


def named_auxiliaries(model: nn.Module) -> Iterator[tuple[str, Auxiliary]]:
    """Every auxiliary module once, by its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Auxiliary))


def rooms_in(model: nn.Module) -> list[SideRoom]:
    """The rooms of a model's auxiliary modules."""
    return list(dict.fromkeys(module.room for _, module in named_auxiliaries(model)))


def close_auxiliaries(model: nn.Module) -> nn.Module:
    """The model with what its auxiliary modules decide in its weights, and without them; in place.

    Weights that they switch off are removed: masked in variational layers, where they stay zero through further
    training, and set to zero in others. The output in evaluation mode stays what it was.
    """
    for room in rooms_in(model):
        room.fold(model, {})
        room.drop(model)
    return model


def without_auxiliaries(
    function: Callable[Concatenate[nn.Module, _P], _R],
) -> Callable[Concatenate[nn.Module, _P], _R]:
    """The function of a model, during which the model computes as if its auxiliary modules were not there."""

    @functools.wraps(function)
    def run(model: nn.Module, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        modules = [module for _, module in named_auxiliaries(model)] if isinstance(model, nn.Module) else []
        for module in modules:
            module.passes = True
        try:
            return function(model, *args, **kwargs)
        finally:
            for module in modules:
                module.passes = False

    return run
