"""Frozen CLIP features: the encoder, the store, and the way from one to the other."""
