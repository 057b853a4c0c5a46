"""Secure aggregation: one round in which the aggregator learns a sum and nothing else.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS 2017),
hardened against a server that lies. Nothing here opens a socket or a file, reads a clock or loads
torch: sessions take bytes and arrays and give bytes and arrays.
"""
