"""Measuring a model, and the report on two of them: before and after."""

from bayesprune.evaluate.measure import (
    accuracy,
    count_macs,
    count_parameters,
    file_bytes,
    latencies,
    latency,
    macs_by_module,
)
from bayesprune.evaluate.measurement import Measurement, measure
from bayesprune.evaluate.report import HistoryPoint, Report, report

__all__ = [
    "HistoryPoint",
    "Measurement",
    "Report",
    "accuracy",
    "count_macs",
    "count_parameters",
    "file_bytes",
    "latencies",
    "latency",
    "macs_by_module",
    "measure",
    "report",
]
