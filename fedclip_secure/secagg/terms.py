"""What a silo computes from its pinned contract and roster, and never takes from a message."""

from __future__ import annotations

from dataclasses import dataclass

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.quorum import floor, threshold
from fedclip_secure.errors import ConfigError
from fedclip_secure.model.state import Layout
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.ring import FixedPoint, VectorLayout

__all__ = ["VERIFIED_AT_MOST", "Terms", "threshold"]
VERIFIED_AT_MOST = 64_000_000  # bytes of masked vectors that a silo downloads under `verify_sum: auto`


@dataclass(frozen=True, slots=True)
class Terms:
    """The fixed parameters of every secure round of one federation."""

    federation: str
    plan: bytes  # contract digest
    roster: Roster
    threshold: int  # t
    floor: int  # fewest silos on any list
    colluding: int  # c
    rounds: int  # protocol rounds, the closing validation included
    layout: Layout
    vector: VectorLayout
    grid: FixedPoint
    initial_model: bytes  # digest
    training_rounds: int
    counted_from: int  # first round in which validation counts travel
    public_weights: dict[str, int] | None
    verify_sum: bool  # whether every silo downloads the masked vectors and adds them up again
    private: bool = False  # whether every upload names the head of its silo's privacy ledger

    @classmethod
    def of(cls, contract: Contract, roster: Roster) -> Terms:
        """Derive the terms.

        Raises:
            ConfigError: the roster and the plan allow no secure round.
        """
        plan, lock = contract.plan, contract.lock
        agreed, n = plan.secure_aggregation, len(roster.silos)
        t = threshold(n, agreed.threshold, agreed.colluding)
        if t < agreed.colluding + 2:
            raise ConfigError(
                f"secure_aggregation.colluding {agreed.colluding} is too many for {n} silos: the threshold {t} must "
                "be at least colluding + 2, or colluders could subtract themselves; lower it or invite more silos"
            )
        fewest = floor(n, agreed)
        if fewest > n:
            raise ConfigError(f"the plan needs {fewest} silos in every round, the roster has {n}; invite more silos")
        if agreed.public_weights is not None and set(agreed.public_weights) != set(roster.silos):
            raise ConfigError(
                f"secure_aggregation.public_weights names {', '.join(sorted(agreed.public_weights))}, "
                f"the roster {', '.join(roster.silos)}; they must be the same silos"
            )
        layout = Layout(tuple((entry.name, tuple(entry.shape)) for entry in lock.layout))
        counts = plan.splits.validation > 0
        return cls(
            federation=plan.federation,
            plan=contract.digest,
            roster=roster,
            threshold=t,
            floor=fewest,
            colluding=agreed.colluding,
            rounds=plan.training.rounds + int(counts),
            layout=layout,
            vector=VectorLayout(layout.size, counts),
            grid=FixedPoint(agreed.coordinate_clip, n, 1 if agreed.weights == "equal" else agreed.max_weight),
            initial_model=bytes.fromhex(lock.initial_model),
            training_rounds=plan.training.rounds,
            # An earlier run counted for the model that this one goes on from. Counted again over other
            # silos, the difference of the two sums would disclose one silo's counts.
            counted_from=1 if plan.initial is None else 2,
            public_weights=agreed.public_weights,
            verify_sum=_verifies(agreed.verify_sum, n * 4 * layout.size),
            private=plan.privacy is not None,
        )

    def trains(self, number: int) -> bool:
        """Whether updates travel in this round; in the closing one only weights and counts do."""
        return number <= self.training_rounds

    def ends_with(self, number: int, start: bytes, model: bytes) -> bool:
        """Whether no round follows round `number`, which went from the model `start` to `model` (digests).

        A silo adds its update to one model only once, so after a training round that moved nothing none can follow.
        """
        return number >= self.rounds or self.moved_nothing(number, start, model)

    def moved_nothing(self, number: int, start: bytes, model: bytes) -> bool:
        """Whether round `number` was to train and changed no parameter."""
        return self.trains(number) and start == model

    def still(self, number: int) -> str:
        """What such a round tells. Converged, and too small a learning rate, look alike from outside."""
        return (
            f"nothing is left to learn: round {number} changed no parameter (the grid's step is {self.grid.step:.1e}). "
            "If the accuracy is poor, training.optimizer.lr is too small: start a new federation with a larger one, "
            "and not from this adapter, over which the silos have sent updates"
        )

    def circle(self, number: int, earlier: int) -> str:
        """What it tells that round `number` ended with the model from which round `earlier` had started."""
        return (
            f"the models go in a circle: round {number} came back to the model that round {earlier} started from, over "
            "which the silos have sent updates. Nothing more is learnt at this step: start a new federation with a "
            "smaller training.optimizer.lr or fewer rounds, and not from an adapter of this one"
        )

    def weight(self, silo: str, records: int) -> int:
        """The weight of `silo`, which has so many training records, by the plan."""
        if self.public_weights is not None:
            return self.public_weights[silo]
        return min(records, self.grid.max_weight)

    def round_name(self, number: int) -> str:
        """A round as people count them: training rounds, then one that only counts validation records."""
        if not self.trains(number):
            return "closing validation round"
        return f"round {number} of {self.training_rounds}"

    @property
    def absent_tolerated(self) -> int:
        """How many silos of the roster may miss a round."""
        return len(self.roster.silos) - self.floor


def _verifies(choice: str, size: int) -> bool:
    return choice == "always" or (choice == "auto" and size <= VERIFIED_AT_MOST)
