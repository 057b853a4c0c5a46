"""What a data protection officer asks of a plan first, in the words and numbers of the report's page."""

from __future__ import annotations

from dataclasses import dataclass

from fedclip_secure.config.lock import ExternalEncoder, FederationLock
from fedclip_secure.config.plan import Accuracy, FederationPlan
from fedclip_secure.config.quorum import floor, threshold
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.report.wording import NOT_STATED


@dataclass(frozen=True, slots=True)
class Fact:
    """One line: what, how much or who, and what that means."""

    name: str
    value: str
    means: str = ""


def agreed(plan: FederationPlan, lock: FederationLock) -> list[Fact]:
    """For what, whom to ask, what becomes of it, and what is trained."""
    if isinstance(lock.encoder, ExternalEncoder):
        made = f"none here: {lock.encoder.dim} features from files of the silos"
    else:
        made = f"{lock.encoder.name}, weights {lock.encoder.weights_sha256[:16]}…, {lock.encoder.dim} features"
    return [
        Fact("purpose", plan.purpose or NOT_STATED),
        Fact("whom to ask", plan.contact or NOT_STATED),
        Fact("what becomes of the model", plan.retention or NOT_STATED),
        Fact("method", plan.method.name),
        Fact("encoder", made),
        Fact("classes", ", ".join(plan.classes)),
        Fact("rounds", str(plan.training.rounds)),
    ]


def parties(plan: FederationPlan, roster: Roster) -> list[Fact]:
    """Who takes part, and the numbers that the masks lean on: n, c, t and the smallest sum."""
    masks, n = plan.secure_aggregation, len(roster.silos)
    t, smallest, colluding = threshold(n, masks.threshold, masks.colluding), floor(n, masks), masks.colluding
    liar = "that lies" if masks.threshold == "malicious" else "that keeps to the protocol, but not one that lies,"
    return [
        Fact("silos", f"{n}: {', '.join(roster.silos)}", "Each trains on its own records, at home."),
        Fact(
            "coordinator's server",
            plan.server.removeprefix("https://"),
            "It adds up masked updates, and gives every silo each model.",
        ),
        Fact(
            "silos that may collude (c)",
            str(colluding),
            f"So many, together with a coordinator {liar} cannot open the update of another silo.",
        ),
        Fact(
            "shares needed (t)",
            f"{t} of {n}",
            "So many silos must answer before a sum is opened. So many that collude could open single updates.",
        ),
        Fact(
            "smallest sum",
            f"{smallest} silos",
            f"No sum that is opened has fewer in it: {smallest - colluding} beside those that may collude.",
        ),
    ]


@dataclass(frozen=True, slots=True)
class Cost:
    """What the noise costs one class: shares of records that were right, and their difference in points."""

    name: str
    without: float
    noisy: float

    @property
    def points(self) -> float:
        """Negative where the noise costs something."""
        return round(100 * (self.noisy - self.without), 1) + 0.0  # a negative zero is a plain one


def costs(plan: FederationPlan) -> tuple[Accuracy, list[Cost]] | None:
    """What the plan says of each class, in its order; None where it gives no figure."""
    given = plan.privacy.accuracy if plan.privacy else None
    if given is None:
        return None
    return given, [Cost(name, given.without_noise[name], given.with_noise[name]) for name in plan.classes]


def most_hurt(found: list[Cost]) -> str:
    """Whether the noise hurts classes unequally, in one sentence."""
    worst = min(found, key=lambda cost: cost.points)
    if worst.points >= 0:
        return "By these figures the noise costs no class anything."
    least = max(found, key=lambda cost: cost.points)
    if worst.points == least.points:
        return f"By these figures the noise costs every class the same ({-worst.points:.1f} points)."
    return (
        f"By these figures the noise costs {worst.name} most ({-worst.points:.1f} points), and {least.name} least "
        f"({max(0.0, -least.points):.1f})."
    )
