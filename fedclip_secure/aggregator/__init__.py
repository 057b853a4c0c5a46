"""The coordinator's server: HTTP, the state machine of rounds, and all SQL. Loads no torch."""
