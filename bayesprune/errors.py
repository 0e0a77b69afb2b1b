"""The errors a caller may want to catch, under one base class."""


class BayespruneError(Exception):
    """Base of the package's own errors."""


class StorageError(BayespruneError, ValueError):
    """A saved directory is missing, damaged, cannot be written, or does not fit the model."""


class InfeasibleTargetError(BayespruneError, ValueError):
    """A pruning target that this model cannot reach."""


class UnsupportedModelError(BayespruneError, TypeError):
    """A model, wrapper or layer that an operation does not take."""


class UnsupportedFunctionError(BayespruneError, NotImplementedError):
    """A torch function has no rule for tensors with mean and variance."""
