"""The parameters that travel."""
