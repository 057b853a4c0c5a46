"""Who takes part in what."""

from __future__ import annotations

from dataclasses import dataclass

from fedclip_secure.pki.identity import Identity
from fedclip_secure.secagg.terms import Terms


@dataclass(frozen=True, slots=True)
class Party:
    """This silo and the terms that it accepted."""

    identity: Identity
    terms: Terms

    def weight(self, records: int) -> int:
        """This silo's weight by the plan."""
        return self.terms.weight(self.identity.name, records)
