"""How many silos a secure round needs; what people ask of a plan, and what `secagg` holds every round to."""

from __future__ import annotations

from fedclip_secure.config.plan import SecureAggregation
from fedclip_secure.names import MIN_SILOS


def threshold(silos: int, mode: str, colluding: int) -> int:
    """t: how many silos must answer before anything is unmasked.

    `malicious`: two sets of t silos overlap in more than the c that collude with the server, so no
    two different lists of survivors can both gather t honest answers. t > (n + c) / 2 does that;
    t > 2n / 3 keeps it for up to a third of colluders. `honest_but_curious`: t > n / 2.
    """
    if mode == "malicious":
        return max(2 * silos // 3 + 1, (silos + colluding) // 2 + 1)
    return silos // 2 + 1


def floor(silos: int, agreed: SecureAggregation) -> int:
    """The fewest silos whose updates are ever in one sum."""
    t = threshold(silos, agreed.threshold, agreed.colluding)
    return max(t, agreed.min_silos, agreed.colluding + 2, MIN_SILOS)
