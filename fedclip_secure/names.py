"""Names of parties, as they stand in the roster, in certificates and in messages."""

from __future__ import annotations

NAME_PATTERN = r"^[a-z0-9-]{1,63}$"
AGGREGATOR = "aggregator"  # the roster's name for the coordinator's own signing key
