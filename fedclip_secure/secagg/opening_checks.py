"""What a silo checks before it joins an attempt: pins, order, and the chain of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedclip_secure.errors import ProtocolError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.secagg.messages import Result, ServerAd, base_hash, by_sender, open_message
from fedclip_secure.secagg.sealing import check_seal_public
from fedclip_secure.secagg.terms import Terms


@dataclass(frozen=True, slots=True)
class Position:
    """How far a silo has followed the run."""

    round: int = 0  # last round whose opening it accepted
    attempt: int = 0  # last attempt that it joined
    model: bytes | None = None  # digest that the round started from


@dataclass(frozen=True, slots=True)
class Opening:
    """An attempt that a silo has accepted; `base` names it."""

    ad: ServerAd
    base: bytes


def check_opening(terms: Terms, position: Position, wire: bytes, results: Sequence[bytes]) -> Opening:
    """Verify a `ServerAd` and the t `Result`s of the round before it, which alone may open the next one.

    Raises:
        ProtocolError: `signature`, `plan`, `roster`, `key`, `replay`, `chain`, or a fault of encoding.
    """
    signed = open_message(wire, ServerAd, terms.federation, terms.roster)
    ad = signed.body
    if signed.sender != AGGREGATOR:
        raise ProtocolError("signature", f"an opening is signed by {signed.sender!r}, not by the aggregator")
    _check_pins(terms, ad)
    check_seal_public(ad.seal_public)
    if ad.round < position.round or ad.attempt <= position.attempt or ad.round > terms.rounds:
        raise ProtocolError(
            "replay",
            f"the server opened round {ad.round}, attempt {ad.attempt}; this silo has seen round {position.round}, "
            f"attempt {position.attempt}, and the plan ends with round {terms.rounds}",
        )
    if ad.round == position.round and ad.model != position.model:
        raise ProtocolError("chain", f"the server opened round {ad.round} again over another model")
    _check_chain(terms, position, ad, results)
    return Opening(ad, base_hash(ad))


def reopen(terms: Terms, wire: bytes) -> Opening:
    """An opening that this party has made or accepted before.

    Raises:
        ProtocolError: it was altered since.
    """
    ad = open_message(wire, ServerAd, terms.federation, terms.roster).body
    return Opening(ad, base_hash(ad))


def check_results(terms: Terms, wires: Sequence[bytes]) -> Result:
    """Verify that t silos signed one and the same `Result` of this plan and roster.

    Raises:
        ProtocolError: `chain`, or a fault of encoding or signature.
    """
    results = by_sender(wires, Result, terms.federation, terms.roster)
    bodies = {message.body for message in results.values()}
    if len(results) < terms.threshold or len(bodies) != 1:
        raise ProtocolError(
            "chain",
            f"{len(results)} silos vouch for {len(bodies)} different result(s); {terms.threshold} must agree on one",
        )
    result = bodies.pop()
    if (result.plan, result.roster) != (terms.plan, terms.roster.digest):
        raise ProtocolError("chain", "the server gave results of another run, under another plan or roster")
    return result


def _check_pins(terms: Terms, ad: ServerAd) -> None:
    for name, pinned, offered in (("plan", terms.plan, ad.plan), ("roster", terms.roster.digest, ad.roster)):
        if pinned != offered:
            raise ProtocolError(
                name,
                f"the server runs another {name}: pinned sha256:{pinned.hex()}, offered sha256:{offered.hex()}; "
                "compare both with the coordinator, then run `fedclip-silo accept`",
            )


def _check_chain(terms: Terms, position: Position, ad: ServerAd, results: Sequence[bytes]) -> None:
    if ad.round == 1:
        if ad.model != terms.initial_model:
            raise ProtocolError("chain", "round 1 does not start from the plan's initial model")
        return
    last = check_results(terms, results)
    if last.round != ad.round - 1 or last.model != ad.model:
        raise ProtocolError(
            "chain", f"round {ad.round} does not start from the model that round {last.round} ended with"
        )
    if terms.ends_with(last.round, last.start, last.model):
        raise ProtocolError("chain", f"round {last.round} changed no parameter, so none may follow it")
    if position.round == last.round and last.start != position.model:
        raise ProtocolError("chain", f"round {last.round} ended over another model than the one that this silo joined")
