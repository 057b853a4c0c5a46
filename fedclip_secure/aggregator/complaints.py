"""Whom complaints keep out of a round: one of the two lies, and nobody can tell which."""

from __future__ import annotations

from collections.abc import Sequence

from fedclip_secure.secagg.terms import Terms


def excluded(complaints: Sequence[tuple[str, str]], terms: Terms) -> set[str]:
    """Whom complaints (accuser, accused), in the order they came, keep out of further attempts at a round.

    More accusers than can collude are right: then the accused alone is out. Else a first complaint keeps
    out both; where that would leave too few, and from an accuser's second complaint on, only the accuser.
    So neither a liar nor a sender of garbage can empty the round.
    """
    accused = {name for _, name in complaints}
    guilty = {name for name in accused if len({who for who, whom in complaints if whom == name}) > terms.colluding}
    out, accusers = set(guilty), set[str]()
    for accuser, name in complaints:
        if name in guilty:
            continue
        both = out | {accuser, name}
        first = accuser not in accusers and len(terms.roster.silos) - len(both) >= terms.floor
        out = both if first else out | {accuser}
        accusers.add(accuser)
    return out
