"""Training with differential privacy: DP-SGD, and why one unit moves no more than it may."""
