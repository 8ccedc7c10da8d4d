"""Anomaly detection on scikit-learn's breast-cancer table: trained on benign rows."""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe."""
    config = config_lib.base()
    config.data.name = "breast_cancer"
    return config
