"""The embedded default: a whole federation on this machine, with real processes, certificates and TLS."""
