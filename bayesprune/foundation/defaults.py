"""What is taken where the user names nothing else: one value each for library, callback, task and command.

A default is a result: `EVIDENCE` names the page that earned it, and docs/defaults.md is checked against this file.
"""

STD = "per_weight"
RELATIVE_STD = 0.1
ESTIMATOR = "auto"
TEMPERATURE = "auto"
LARGEST_TEMPERATURE = 0.1
WARMUP = 0.1
STD_LR = 1e-2
MAX_NOISE_COST = 0.2
PRUNE_BEGIN, PRUNE_END, PRUNE_UPDATES = 0.25, 0.75, 50
CHANNEL_POWER = 1.0
WEIGHT_POWER = 0.5
CALIBRATION_EXAMPLES = 1_024
CHANNEL_FLOOR = 0.1
DISTILLATION_TEMPERATURE, DISTILLATION_WEIGHT = 4.0, 0.9

EVIDENCE = {
    "STD": "benchmarks/criterion.md",
    "RELATIVE_STD": "how_it_works.md",
    "ESTIMATOR": "benchmarks/criterion.md",
    "TEMPERATURE": "benchmarks/sst2.md",
    "LARGEST_TEMPERATURE": "benchmarks/sst2.md",
    "WARMUP": "benchmarks/sst2.md",
    "STD_LR": "how_it_works.md",
    "MAX_NOISE_COST": "how_it_works.md",
    "PRUNE_BEGIN": "benchmarks/sst2.md",
    "PRUNE_END": "benchmarks/sst2.md",
    "PRUNE_UPDATES": "benchmarks/sst2.md",
    "CHANNEL_POWER": "benchmarks/criterion.md",
    "WEIGHT_POWER": "benchmarks/criterion.md",
    "CALIBRATION_EXAMPLES": "benchmarks/fair.md",
    "CHANNEL_FLOOR": "benchmarks/fair.md",
    "DISTILLATION_TEMPERATURE": "benchmarks/fair.md",
    "DISTILLATION_WEIGHT": "benchmarks/fair.md",
}
"""By name, the page of docs with the measurement."""
