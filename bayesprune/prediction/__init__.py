"""What a converted model predicts: samples, moments and their uncertainty, compiled or not."""

from bayesprune.prediction.compiled import compile_moments
from bayesprune.prediction.predict import Prediction, predict, sampling

__all__ = ["Prediction", "compile_moments", "predict", "sampling"]
