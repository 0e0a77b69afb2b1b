"""Measuring a model, and the report on two of them: before and after."""

from bayesprune.reports.measure import (
    accuracy,
    count_macs,
    count_parameters,
    file_bytes,
    latencies,
    latency,
    macs_by_module,
    perplexity,
)
from bayesprune.reports.measurement import ACCURACY, PERPLEXITY, ExtraTable, Measurement, Metric, measure
from bayesprune.reports.report import HistoryPoint, Report, report

__all__ = [
    "ACCURACY",
    "PERPLEXITY",
    "ExtraTable",
    "HistoryPoint",
    "Measurement",
    "Metric",
    "Report",
    "accuracy",
    "count_macs",
    "count_parameters",
    "file_bytes",
    "latencies",
    "latency",
    "macs_by_module",
    "measure",
    "perplexity",
    "report",
]
