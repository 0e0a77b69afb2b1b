"""Layers that read several raw weights in a forward of their own: all are drawn at once, and the stock forward runs."""

from contextlib import ExitStack
from typing import Any

from bayesprune.estimators import center, uncertain
from bayesprune.layers.base import VariationalLayer


class DrawnLayer(VariationalLayer):
    """Mixin in front of a stock layer that computes with its weights as it likes, so weight sampling is what there is.

    In training a forward of the stock layer finds one draw of every posterior in place of the means.
    """

    is_linear_in_weight = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward at the means in eval mode; at one draw of all weights otherwise."""
        estimator = self.running_estimator((*args, *kwargs.values())[0])
        layers = self.drawn_layers()
        if estimator == "mean" and not any(layer.changes_weights() for layer in layers):
            for layer in layers:
                layer.apply_masks()
            return self.stock_type.forward(self, *args, **kwargs)
        with ExitStack() as stack:
            value = {"mean": center, "moments": uncertain}.get(estimator)
            for layer in layers:
                names = layer.active_names()
                draws = {n: layer.draw(n) if value is None else value(layer.posterior(n)) for n in names}
                stack.enter_context(layer.substituted(**draws))
            return self.stock_type.forward(self, *args, **kwargs)

    def drawn_layers(self) -> list[VariationalLayer]:
        """The layers whose raw weights this forward reads."""
        return [self]
