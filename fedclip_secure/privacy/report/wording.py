"""What a report says in words: the claim's sentences, and the fixed texts that follow from the plan.

The fixed texts hold no figures of a run, and `tools/verify_report.py` knows each by its hash: whoever changes a word
here changes it there (a test says how).
"""

from __future__ import annotations

import math

from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.privacy.report.document import Note, Scope

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def claim_sentence(silo: str, federation: str, unit: str, epsilon: float, delta: float) -> str:
    """The claim of one silo, to be read by itself."""
    return (
        f"Adding or removing any one {unit} makes nothing that training at {silo} puts into its uploads to federation "
        f"{federation}, or into any model made from them, more than {times(epsilon)} times as likely "
        f"(ε = {epsilon:.4f}), apart from a probability of {small(delta)} (δ)."
    )


def together_sentence(federation: str, unit: str, worst: float, together: float | None, delta: float) -> str:
    """The claim over all silos of a federation."""
    everywhere = "nothing" if together is None else f"ε = {together:.4f}"
    return (
        f"Over all rounds that the plan of federation {federation} allows, ε = {worst:.4f} holds for any one {unit} "
        f"at one silo alone, and {everywhere} for a person with one {unit} at every silo, "
        f"both with δ = {small(delta)}."
    )


def lifetime_sentence(unit: str, epsilon: float, delta: float) -> str:
    """What the silo's own limit does, and what that promises."""
    return (
        f"No {unit} takes part in a run that would take its charges, over all runs of this ledger, above "
        f"ε = {epsilon:.4g} at δ = {small(delta)}. This bounds its lifetime if the limit stood from the first run on "
        "and is never raised."
    )


def changed_limit_sentence(epsilon: float, delta: float) -> str:
    """The same where the limit was another one before."""
    return (
        f"The silo's limit is ε = {epsilon:.4g} at δ = {small(delta)} now, and was another before: it bounds no "
        "lifetime."
    )


def times(epsilon: float) -> str:
    """e to the power of `epsilon`, rounded up: three digits below 1,000, a power of ten from a million on."""
    value = math.exp(min(epsilon, 20.0))
    if value >= 1e6:
        return f"10{str(math.ceil(epsilon / math.log(10))).translate(_RAISED)}"
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{math.ceil(value * 10**digits) / 10**digits:,.{digits}f}"


def small(value: float) -> str:
    """A probability to three digits: 0.01, 10⁻⁵, 2.5·10⁻⁶."""
    digits, _, exponent = f"{value:.3g}".partition("e")
    if not exponent:
        return digits
    power = f"10{str(int(exponent)).translate(_RAISED)}"
    return power if digits == "1" else f"{digits}·{power}"


def scope(plan: FederationPlan) -> list[Scope]:
    """Everything that a silo gives out, each `accounted`, `public` or `unprotected`; it follows from the plan alone."""
    return [*(_private_scope() if plan.privacy else _plain_scope(plan)), *_ALWAYS]


def _private_scope() -> list[Scope]:
    return [
        Scope(
            id="update",
            what="The update of each round, and with it the silo's part in the sums and in every model.",
            status="accounted",
            because="It is made from clipped and noised sums alone; the claim is about these.",
        ),
        Scope(
            id="weight",
            what="The weight with which the update counts.",
            status="public",
            because="It stands in the plan, the same for any number of records.",
        ),
        Scope(
            id="ledger",
            what="The state of the ledger that goes with each upload, and the ledger in this report.",
            status="public",
            because="Its entries, of all federations, hold numbers of plans, times and names, and nothing of a record.",
        ),
        Scope(
            id="bound",
            what="The lower bound of the number of units, where the report gives one.",
            status="unprotected",
            because="A person at the silo chose it, knowing the data.",
        ),
    ]


def _plain_scope(plan: FederationPlan) -> list[Scope]:
    masked = plan.secure_aggregation.weights == "masked"
    weight = Scope(
        id="weight-masked" if masked else "weight",
        what="The weight with which the update counts.",
        status="unprotected" if masked else "public",
        because="It is the number of training records: masked, but its part in the sums shows when silos come and go."
        if masked
        else "It stands in the plan, the same for any number of records.",
    )
    return [
        Scope(
            id="update-plain",
            what="The update of each round, and with it the silo's part in the sums and in every model.",
            status="unprotected",
            because="It is masked, but the sums and the models are made of it without noise and may disclose records.",
        ),
        weight,
        *([_COUNTS] if plan.splits.validation > 0 else []),
    ]


_COUNTS = Scope(
    id="counts",
    what="The numbers of validation records, and of those that were right.",
    status="unprotected",
    because="They are masked, but their part in the sums shows when silos come and go.",
)
_ALWAYS = [
    Scope(
        id="protocol",
        what="Public keys, shares of secrets, masks and signatures.",
        status="public",
        because="They are made from the system's randomness and from what the other items here say.",
    ),
    Scope(
        id="identity",
        what="The silo's name, certificate and network address.",
        status="public",
        because="They are those of the organisation, not of its records.",
    ),
    Scope(
        id="presence",
        what="In which rounds the silo takes part or trains again, whether its data changed, and when it refuses.",
        status="unprotected",
        because="No noise is added to it; a silo whose data are used up, for one, stays away.",
    ),
    Scope(
        id="timing",
        what="When the silo answers.",
        status="unprotected",
        because="It trains before it answers, so the time grows with the number of its records.",
    ),
    Scope(
        id="logs",
        what="Logs and error messages that a person passes on.",
        status="unprotected",
        because="They may name files and count records.",
    ),
    Scope(
        id="results",
        what="Tables, pictures, predictions and models that the silo makes for itself, where they are passed on.",
        status="unprotected",
        because="They are made from its records without noise.",
    ),
]


def not_covered(plan: FederationPlan) -> list[Note]:
    """What a claim does not reach, or what nothing protects where there is none."""
    return [*(_BEYOND_THE_CLAIM if plan.privacy else _WITHOUT_CLAIM), *_NEVER_COVERED]


_BEYOND_THE_CLAIM = [
    Note(
        id="knowledge",
        text="What is true of people whether or not they are in the data.",
        because="A model learns what a disease looks like. That is its purpose, and it can be applied to anybody.",
    ),
    Note(
        id="several",
        text="Persons with more units than the claim counts.",
        because="Each further unit weakens the claim; the table of groups says by how much.",
    ),
    Note(
        id="copies",
        text="Copies of a record that were encoded anew.",
        because="A unit goes by its bytes or its patient id, so such a copy is a unit with an account of its own.",
    ),
    Note(
        id="elsewhere",
        text="The same person at another silo, and other releases about the same person.",
        because="Each silo's claim is about its own uploads; the federation's report adds up over silos.",
    ),
]
_WITHOUT_CLAIM = [
    Note(
        id="no-privacy",
        text="Any record: this plan has no differential privacy.",
        because="Whoever has the sums or the models may test whether a record was in the data, or rebuild parts of it.",
    )
]
_NEVER_COVERED = [
    Note(
        id="choices",
        text="Classes, templates and settings that were chosen after looking at data.",
        because="The choice itself can disclose what was seen.",
    ),
    Note(
        id="trials",
        text="Trial runs, simulations and searches for settings on the same data.",
        because="They are outside the run that this report is about.",
    ),
]


def trust(plan: FederationPlan) -> list[Note]:
    """Who could see what, and on whom the answer leans."""
    last = _LEANS_PRIVATE if plan.privacy else _LEANS_PLAIN
    small = _SMALL_PLAIN if plan.secure_aggregation.threshold == "honest_but_curious" else _SMALL_STRICT
    return [_SINGLE, small, _SUM, _LOCAL, last]


_SINGLE = Note(
    id="single",
    text="Who can see the update of one silo?",
    because="Nobody but the silo: it leaves masked. The coordinator could if enough silos gave up their secrets.",
)
_SMALL_STRICT = Note(
    id="threshold",
    text="Against whom are the masks made?",
    because="A coordinator that lies, together with as many silos as the plan says may collude.",
)
_SMALL_PLAIN = Note(
    id="threshold-weak",
    text="Against whom are the masks made?",
    because="A coordinator that follows the protocol and is curious. One that lies is not provided for by this plan.",
)
_SUM = Note(
    id="sum",
    text="Who can see the sums and the models?",
    because="The coordinator and all silos, and whoever they give a model to.",
)
_LOCAL = Note(
    id="local-machine",
    text="Who could cheat unseen?",
    because="Whoever runs the silo's machine: the records are there, and no file can prove which program ran on them.",
)
_LEANS_PRIVATE = Note(
    id="fallback",
    text="What if the masks fail?",
    because="The claim still holds: each update is noised enough by itself, at home, before it is masked.",
)
_LEANS_PLAIN = Note(
    id="no-fallback",
    text="What if the masks fail?",
    because="Then the update of one silo is open, without noise. Nothing else protects it.",
)

MECHANISM = "DP-SGD: a Gaussian sum over a Poisson sample of units (Abadi et al. 2016)"
MECHANISM_OF_ONE_SUM = "One Gaussian sum of what the units' own features add, without training steps"
ONE_SUM = frozenset({"private_prototypes", "discriminant"})  # methods that are such a sum, and have no loss
MECHANISM_NOTES = [
    "Every unit is in a step with the same probability, by itself; batches are not cut to a size.",
    "What one unit adds is summed and clipped, and the noise is added to the sum over units.",
    "Noise and batches come from a cipher keyed by the operating system; no seed of the plan reaches them.",
    "The sum is divided by a constant of the plan, never by the number of records.",
    "Sum and noise are 64-bit floating point, rounded to a fixed grid; what floating point leaves is not accounted.",
    "Every phase of a method draws a batch of its own and is charged as a release of its own.",
]
NOT_STATED = "not stated in the plan"  # where a plan could say for what, whom to ask, and what becomes of the model
CANNOT_SHOW = [
    "which program ran on the silo's machine",
    "that the noise was added, and drawn as it should be",
    "that the tests of the mechanism were run: the silo says so",
    "that there is no second ledger, and no training beside this one",
    "that no newer rounds were left out together with their receipts: the coordinator's report shows those",
    "that two files with different names or bytes are not of the same person",
    "that the fingerprints are those that people compared: compare them yourself",
]
