"""One model, any size: smaller versions that share its weights, saved beside it and chosen when it is loaded."""

from bayesprune.elastic.drawn import LevelDraws
from bayesprune.elastic.nested import levels
from bayesprune.elastic.wider import widen
from bayesprune.storage.levels import Level

__all__ = ["Level", "LevelDraws", "levels", "widen"]
