"""From what was done to private data to (ε, δ)."""
