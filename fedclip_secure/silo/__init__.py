"""A silo's side of a run: what it accepts, what it remembers, what it sends."""
