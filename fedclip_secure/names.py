"""Names of parties, as they stand in the roster, in certificates and in messages, and how many there may be."""

from __future__ import annotations

from typing import Literal

NAME_PATTERN = r"^[a-z0-9-]{1,63}$"
AGGREGATOR = "aggregator"  # the roster's name for the coordinator's own signing key
MIN_SILOS = 3  # with 2, each can subtract itself from the sum
MAX_SILOS = 255  # Shamir evaluates at the non-zero points of GF(2^8)
Normalisation = Literal["casefold", "strip_zeros"]  # of a patient's id, in this order (data/patients.py)
Column = Literal["path", "label", "patient"]  # of a CSV file of images (data/manifest.py)
