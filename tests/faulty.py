"""Records with faults; small, since reading processes import this too."""

import numpy as np

from ddaebm_jax.data.records import UnusableRecord


class Faulty:
    """Pixels that tell their record, but for some that cannot be read.

    Attributes:
      unusable: records that are unusable.
      errors: what is raised instead of others.
    """

    def __init__(self, number, unusable=(), errors=None):
        self.number = number
        self.unusable = frozenset(unusable)
        self.errors = errors or {}

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        if index in self.errors:
            raise self.errors[index]
        if index in self.unusable:
            raise UnusableRecord(f"record {index} is unusable")
        return np.full((1, 1, 1), index, np.uint8)
