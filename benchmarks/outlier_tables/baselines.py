"""The detectors that the energy is compared with.

Each is fitted to standardised training rows, and keeps its library's defaults but for
what is said here. Scores are larger for inliers.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from ddaebm_jax.evaluation import detectors

Scores = Float[np.ndarray, " m"]
Detector = Callable[[np.ndarray, np.ndarray, int], Scores]

_NEIGHBOUR, _COMPONENTS = 5, 4
_MIXTURE_VARIANCE = 1e-3  # Added to variances: with less some tables cannot be fitted.


def _of_table_detectors(name: str, train: Any, test: Any, seed: int) -> Scores:
    return detectors.table_detectors(seed)[name].fit(train).score_samples(test)


def _neighbour(train: Any, test: Any, seed: int) -> Scores:
    from sklearn.neighbors import NearestNeighbors

    del seed
    neighbours = min(_NEIGHBOUR, len(train))
    found = NearestNeighbors(n_neighbors=neighbours).fit(train)
    return -found.kneighbors(test)[0][:, -1]


def _mixture(train: Any, test: Any, seed: int) -> Scores:
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        min(_COMPONENTS, len(train)),
        covariance_type="diag",
        reg_covar=_MIXTURE_VARIANCE,
        random_state=seed,
    )
    return mixture.fit(train).score_samples(test)


def _gaussian(train: Any, test: Any, seed: int) -> Scores:
    from sklearn.covariance import LedoitWolf

    del seed
    return -LedoitWolf().fit(train).mahalanobis(test)


def _pyod(name: str, train: Any, test: Any, seed: int) -> Scores:
    """Returns minus PyOD's decision function.

    ECOD's and COPOD's is PyOD's own: it ranks all rows to be scored together with those
    it was fitted to.
    """
    module = importlib.import_module(f"pyod.models.{_PYOD[name]}")
    options = {} if name in ("ECOD", "COPOD", "HBOS") else {"random_state": seed}
    if name.lower() in NEEDS_TORCH:
        options["verbose"] = 0
    if name == "DeepSVDD":
        options["n_features"] = train.shape[1]
    fitted = getattr(module, name)(**options).fit(train)
    return -fitted.decision_function(test)


# Class → its module.
_PYOD = {
    "ECOD": "ecod",
    "COPOD": "copod",
    "HBOS": "hbos",
    "PCA": "pca",
    "INNE": "inne",
    "DeepSVDD": "deep_svdd",
    "AutoEncoder": "auto_encoder",
}
NEEDS_TORCH = "deepsvdd", "autoencoder"

SCIKIT_LEARN: dict[str, Detector] = {
    "iforest": partial(_of_table_detectors, "isolation forest"),
    "ocsvm": partial(_of_table_detectors, "one-class SVM"),
    "lof": partial(_of_table_detectors, "local outlier factor"),
    "knn": _neighbour,
    "kde": partial(_of_table_detectors, "kernel density"),
    "mixture": _mixture,
    "gaussian": _gaussian,
}
PYOD: dict[str, Detector] = {name.lower(): partial(_pyod, name) for name in _PYOD}
DETECTORS = SCIKIT_LEARN | PYOD


def missing() -> dict[str, str]:
    """Returns the detectors that cannot run here, and the package that each needs."""
    needs = {"torch": NEEDS_TORCH, "pyod": tuple(PYOD)}
    return {
        detector: package
        for package, detectors_of_it in needs.items()
        if importlib.util.find_spec(package) is None
        for detector in detectors_of_it
    }
