"""The score of a candidate, learnt from candidates of scans with annotations: the share of such that are nodules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize

from utils import check

TERMS = 7  # of a learnt score
SUREST = 0.001  # probabilities nearer to 0 or 1 than this are taken as it
RIDGE = 1.0  # penalty of the squared weights of terms of unit variance, as if of a candidate or so


class Features(NamedTuple):
    """What is known of a candidate, judged by the grid of its network.

    Args:
        certainty: Mean probability in and next to it.
        peak: Mean of the likeliest 33 mm³ there; what is missing counts as 0.
        roundness: Shortest over longest axis, 1 for a ball.
        diameter_mm: Of the sphere of equal volume.
        haze: Mean probability of what lies 3 to 8 mm away.
        air: Share of what lies 2 to 6 mm away that is aerated lung; NaN where the image is not known.
    """

    certainty: float
    peak: float
    roundness: float
    diameter_mm: float
    haze: float
    air: float

    @property
    def score(self) -> float:
        """How likely it is a nodule, in [0, 1], without anything learnt: certainty times roundness.

        Where the network hesitates, it is often at a vessel: the probability fades out slowly, and the candidate is
        longer than thick. The highest probability tells neither.
        """
        return min(1.0, self.certainty * self.roundness)

    @property
    def terms(self) -> tuple[float, ...]:
        """Log-odds of certainty, peak and haze, logarithm of the diameter in mm, roundness, air, diameter times air.

        The last one, since what is large and has no lung around it is often a piece of another organ.
        """
        log_odds = [_log_odds(value) for value in (self.certainty, self.peak, self.haze)]
        diameter = math.log(max(self.diameter_mm, SUREST))
        return (*log_odds, diameter, self.roundness, self.air, diameter * self.air)


def _log_odds(probability: float) -> float:
    probability = min(max(probability, SUREST), 1 - SUREST)
    return math.log(probability / (1 - probability))


@dataclass(frozen=True)
class LearntScore:
    """Logistic regression of ``Features.terms``.

    Args:
        weights: One a term.
        intercept: Log-odds where all terms are 0.
        candidates: Number of candidates that it was fitted on.

    Raises:
        InputError: There is not one weight a term.
    """

    weights: tuple[float, ...]
    intercept: float
    candidates: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))  # of a list, as checkpoints hold it
        check(len(self.weights) == TERMS, f"a learnt score has {TERMS} weights, not {len(self.weights)}")

    def __str__(self) -> str:
        return f"logistic regression, fitted on {self.candidates} candidates"

    def __call__(self, features: Features) -> float:
        """Share of such candidates that are nodules, in [0, 1].

        Raises:
            InputError: It is not known what lies around the candidate.
        """
        check(not math.isnan(features.air), "a learnt score needs the image that the map is of")
        return 1 / (1 + math.exp(-min(max(self.log_odds(features), -500.0), 500.0)))

    def log_odds(self, features: Features) -> float:
        """Logarithm of the odds of that share."""
        return self.intercept + float(np.dot(self.weights, features.terms))


def fit_score(candidates: Sequence[Features], is_nodule: npt.ArrayLike) -> LearntScore:
    """The score with the highest likelihood for candidates that are nodules or not, with a little ridge.

    Args:
        candidates: What is known of each.
        is_nodule: Bool, one a candidate; some are true and some are not.

    Raises:
        InputError: All are nodules, or none is; or it is not known what lies around one.
    """
    truth = np.asarray(is_nodule, float)
    check(len(truth) == len(candidates) and 0 < truth.sum() < len(truth), "candidates must be of both kinds")
    terms = np.array([features.terms for features in candidates])
    check(bool(np.isfinite(terms).all()), "a learnt score needs candidates of a map whose image was given")
    mean, spread = terms.mean(axis=0), np.maximum(terms.std(axis=0), 1e-6)
    inputs = np.column_stack([(terms - mean) / spread, np.ones(len(terms))])
    ridge = np.append(np.full(terms.shape[1], RIDGE), 0.0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        log_odds = inputs @ weights
        errors = 1 / (1 + np.exp(-log_odds)) - truth
        value = np.logaddexp(0, log_odds).sum() - truth @ log_odds + ridge @ weights**2 / 2
        return float(value), inputs.T @ errors + ridge * weights

    fitted = optimize.minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="L-BFGS-B").x
    weights = fitted[:-1] / spread
    return LearntScore(tuple(weights.tolist()), float(fitted[-1] - weights @ mean), len(terms))


def mean_score(scores: Sequence[LearntScore]) -> LearntScore:
    """The score whose log-odds are the mean of those of several."""
    weights = np.mean([score.weights for score in scores], axis=0)
    intercept = float(np.mean([score.intercept for score in scores]))
    return LearntScore(tuple(weights.tolist()), intercept, sum(score.candidates for score in scores))
