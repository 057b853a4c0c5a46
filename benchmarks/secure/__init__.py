"""The parts of `secagg.py`: what is measured, and how."""
