"""Which plans and models are trained with privacy: those whose numbers are of the size that methods are made for.

That a unit moves a clipped sum by C at most does not lean on this (clipping.py): these bounds keep gradients within
single precision, and refuse early what could only be meant to do harm.
"""

from __future__ import annotations

import numpy as np

from fedclip_secure.config.plan import PrivacyPlan
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.model.state import AdapterState

LARGEST_WEIGHT = 100.0  # of a model; what training makes stays far below
LARGEST_SCALE = 1000.0  # of the logits; CLIP's is at most 100
NORMS = (1e-6, 1e6)  # of max_grad_norm


def check_terms(privacy: PrivacyPlan, logit_scale: float) -> None:
    """Refuse a norm or a scale that no method needs.

    Raises:
        ConfigError: names the key.
    """
    least, most = NORMS
    if not least <= privacy.max_grad_norm <= most:
        raise ConfigError(
            f"federation.yaml: privacy.max_grad_norm is {privacy.max_grad_norm:g}; {least:g} to {most:g} is trained "
            "with: gradients outside of it are lost in single precision"
        )
    if not logit_scale <= LARGEST_SCALE:
        raise ConfigError(
            f"logit_scale is {logit_scale:.3g}; with `privacy` at most {LARGEST_SCALE:g} is trained: use an "
            "encoder, or a file of text features, with a smaller one"
        )


def check_bounded(state: AdapterState) -> None:
    """Refuse a model of huge weights.

    Raises:
        ModelError: the largest weight.
    """
    largest = float(np.abs(state.vector).max(initial=0.0))
    if not largest <= LARGEST_WEIGHT:
        raise ModelError(
            f"the model has a parameter of size {largest:.3g}; with `privacy` at most {LARGEST_WEIGHT:g} is "
            "trained; the plan needs another `initial`, or a lower training.optimizer.lr"
        )
