"""What this silo will never go below or above, whatever a plan says."""

from __future__ import annotations

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.silo import Policy
from fedclip_secure.errors import PolicyError
from fedclip_secure.secagg.terms import Terms


def check_policy(policy: Policy, contract: Contract, terms: Terms, silo: str) -> None:
    """Hold a plan and its roster against the silo's own floors.

    Raises:
        PolicyError: lists everything that the policy forbids.
    """
    faults = []
    if silo not in terms.roster.silos:
        faults.append(f"the roster does not hold {silo}")
    if terms.floor < policy.min_silos:
        faults.append(f"a round may average {terms.floor} silos, policy.min_silos is {policy.min_silos}")
    weaker = contract.plan.secure_aggregation.threshold
    if weaker == "honest_but_curious" and policy.threshold == "malicious":
        faults.append("the plan's threshold does not hold against a lying server, policy.threshold is malicious")
    if policy.require_privacy and contract.plan.privacy is None:
        faults.append("the plan has no differential privacy, policy.require_privacy is true")
    if policy.methods is not None and contract.plan.method.name not in policy.methods:
        faults.append(f"the plan's method is {contract.plan.method.name}, policy.methods allows {policy.methods}")
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise PolicyError(f"{silo} does not take part:{listed}\nchange the plan with the coordinator, or silo.yaml")
