"""A silo's share of a round, and what comes before and after it."""
