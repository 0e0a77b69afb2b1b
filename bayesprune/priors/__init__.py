"""Prior densities over weights and their KL divergence in nats, summed over weights, with closed-form gradients.

A `Prior` is bound to the weight tensors of a model once, when training starts; the bound prior of a tensor holds its
constants (a scale, a centre). All densities are elementwise: mean m, std s, sigma^2 = s^2, e = m^2 + s^2.

Sources: Blundell et al., 2015 (Gaussian); Krishnan et al., 2020 (centred on trained weights); MacKay, 1994 (automatic
relevance determination); Louizos et al., 2017, and Ghosh et al., 2018 (horseshoe over groups); Piironen and Vehtari,
2017 (its slab); Kyung et al., 2010 (group lasso); Molchanov et al., 2017 (log-uniform).
"""

from bayesprune.priors.base import (
    Binding,
    BoundGaussian,
    BoundLogUniform,
    BoundNormal,
    BoundPrior,
    Gaussian,
    LogUniform,
    Prior,
)
from bayesprune.priors.dependency import BoundDependency, DependencyGroup, Member, refresh
from bayesprune.priors.learned import ARD, BoundLearned, GroupLasso, Horseshoe

__all__ = [
    "ARD",
    "Binding",
    "BoundDependency",
    "BoundGaussian",
    "BoundLearned",
    "BoundLogUniform",
    "BoundNormal",
    "BoundPrior",
    "DependencyGroup",
    "Gaussian",
    "GroupLasso",
    "Horseshoe",
    "LogUniform",
    "Member",
    "Prior",
    "refresh",
]
