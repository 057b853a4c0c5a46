"""Whom complaints keep out of a round: one of the two lies, and nobody can tell which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from fedclip_secure.secagg.terms import Terms

Case = tuple[str, str]  # accuser, accused


def excluded(complaints: Sequence[Case], terms: Terms) -> set[str]:
    """Whom complaints, in the order they came, keep out of further attempts at a round.

    An honest silo is at odds only with liars: who is at odds with more than can lie together is one, and out
    alone. Else a first complaint keeps out both, and an accuser's further ones only the accuser; where that
    would leave too few, one side of each case is out, so that they are few: of a single case the accuser. Where
    even that leaves too few, everybody may try again with fresh keys. So nobody can empty the round.
    """
    liars = {name for name, others in _at_odds(complaints).items() if len(others) > max(terms.colluding, 1)}
    cases = [case for case in complaints if not liars & set(case)]
    for out in (liars | _both_sides(cases), liars | _one_side(cases), liars):
        if len(terms.roster.silos) - len(out) >= terms.floor:
            return out
    return set()


def _at_odds(cases: Iterable[Case]) -> Mapping[str, set[str]]:
    """Each silo's opponents; accusers come before whom they accuse."""
    at_odds = defaultdict[str, set[str]](set)
    for accuser, accused in cases:
        at_odds[accuser].add(accused)
        at_odds[accused].add(accuser)
    return at_odds


def _both_sides(cases: Iterable[Case]) -> set[str]:
    out, accusers = set[str](), set[str]()
    for accuser, accused in cases:
        out |= {accuser} if accuser in accusers else {accuser, accused}
        accusers.add(accuser)
    return out


def _one_side(cases: list[Case]) -> set[str]:
    """One side of each case, so that they are few: the liars are such a choice."""
    out = set[str]()
    while cases:
        at_odds = _at_odds(cases)
        # Where somebody has one opponent only, some smallest choice holds that opponent.
        alone = {other for others in at_odds.values() if len(others) == 1 for other in others}
        out.add(max(at_odds, key=lambda name: (name in alone, len(at_odds[name]))))
        cases = [case for case in cases if not out & set(case)]
    return out
