"""The two YAML files, the lock, and the contract that binds them."""
