"""Federated CLIP adapters: masked updates over mutual TLS, and a coordinator that learns only the average."""

__version__ = "0.1.0"
