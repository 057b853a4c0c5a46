"""The demo's data: micrographs of laboratories, drawn."""
