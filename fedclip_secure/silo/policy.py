"""What this silo will never go below or above, whatever a plan says."""

from __future__ import annotations

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.method_needs import unlisted, unmet
from fedclip_secure.config.plan import PrivacyPlan
from fedclip_secure.config.silo import Policy
from fedclip_secure.errors import ConfigError, PolicyError
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.ledger.admission import Need, in_words
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.training.private.bounds import check_terms


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
    if contract.plan.privacy is not None:
        faults += _privacy_faults(policy, contract, contract.plan.privacy)
    if policy.methods is not None and contract.plan.method.name not in policy.methods:
        faults.append(f"the plan's method is {contract.plan.method.name}, policy.methods allows {policy.methods}")
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise PolicyError(f"{silo} does not take part:{listed}\nchange the plan with the coordinator, or silo.yaml")


def check_plan(contract: Contract, roster: Roster) -> None:
    """Refuse a plan whose method cannot be trained with it, whoever froze it.

    Raises:
        ConfigError: names each key, what it is, and what it must be.
    """
    _refuse(contract, [*unmet(contract.plan), *unlisted(contract.plan, roster.silos)])


def check_records(contract: Contract, records: int) -> None:
    """The same, once it is known how many training `records` this silo has. Not with privacy, which must not show it.

    Raises:
        ConfigError: as `check_plan`.
    """
    _refuse(contract, unmet(contract.plan, records))


def _refuse(contract: Contract, faults: list[str]) -> None:
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise ConfigError(
            f"the plan of {contract.plan.federation}: method {contract.plan.method.name} does not go with the rest of "
            f"it:{listed}\nso it cannot be trained here: tell the coordinator, who needs a new federation"
        )


def _privacy_faults(policy: Policy, contract: Contract, privacy: PrivacyPlan) -> list[str]:
    """What can be said before the ledger is opened. The lock is the coordinator's: its noise is held to the plan."""
    noise, faults = contract.lock.noise_multiplier, []
    if noise is None:
        return ["the plan has privacy and the lock no noise_multiplier; ask the coordinator to run `prepare` again"]
    if privacy.noise_multiplier not in (None, noise):
        faults.append(f"the lock's noise_multiplier is {noise:g}, the plan's {privacy.noise_multiplier:g}")
    try:
        check_terms(privacy, contract.lock.encoder.logit_scale)
    except ConfigError as error:
        faults.append(str(error))
    if policy.max_epsilon is not None and privacy.delta > policy.delta:
        faults.append(f"the plan's privacy.delta is {privacy.delta:g}, policy.delta is {policy.delta:g}")
    planned = PlannedRun.of(contract)
    if planned is not None and privacy.target_epsilon is not None:
        most = planned.epsilon()
        if most > privacy.target_epsilon:
            faults.append(
                f"the lock's noise_multiplier gives epsilon {most:g}, the plan's target is {privacy.target_epsilon:g}"
            )
    if planned is not None and policy.max_epsilon is not None:
        cap, need = Cap(policy.max_epsilon, policy.delta), Need(planned.per_round, planned.rounds)
        if cap.cost((planned.total,)) > cap.budget:
            faults.append(in_words(cap, need))
    return faults
