"""Rules for single messages and lists that both sides hold each other to."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedclip_secure.errors import ProtocolError
from fedclip_secure.secagg.messages import BUNDLE_BYTES, HASH_BYTES, Bundles, KeyAd, Signed, Upload
from fedclip_secure.secagg.sealing import check_seal_public, check_x25519_public
from fedclip_secure.secagg.terms import Terms


def check_floor(terms: Terms, names: Collection[str], stage: str) -> None:
    """No list may be shorter than the floor that a silo computed itself."""
    if len(names) < terms.floor:
        raise ProtocolError("floor", f"{len(names)} silos at stage {stage!r}, the plan needs {terms.floor}")


def check_key_ad(ad: KeyAd, base: bytes, sender: str) -> None:
    """Keys that are for this attempt and that somebody could seal to safely."""
    if ad.base != base:
        raise ProtocolError("base", f"{sender} sent keys for another attempt", silo=sender)
    if ad.agreed and (ad.agreed != sorted(set(ad.agreed)) or sender not in ad.agreed):
        raise ProtocolError("list", f"{sender} says that it agreed to an impossible list of names", silo=sender)
    try:
        check_x25519_public(ad.mask_public)
        check_seal_public(ad.share_seal)
        check_seal_public(ad.salt_seal)
    except ProtocolError as error:
        raise ProtocolError("key", f"{sender}: {error}", silo=sender) from error


def check_distinct_keys(ads: Mapping[str, Signed[KeyAd]]) -> None:
    """No key stands twice, neither with two silos nor with one in two roles."""
    owner: dict[bytes, str] = {}
    for name, message in ads.items():
        ad = message.body
        # X25519 parts are compared by themselves: a hybrid key may not hide a copied half.
        for key in (ad.mask_public, ad.share_seal[-32:], ad.salt_seal[-32:], ad.share_seal[:-32], ad.salt_seal[:-32]):
            if key in owner:
                raise ProtocolError("key", f"{name} and {owner[key]} use one key twice", silo=name)
            owner[key] = name


def check_bundles(bundles: Bundles, transcript: bytes, sender: str, joined: Collection[str]) -> None:
    """Bundles made for this T, one for each silo of U1 but the sender."""
    if bundles.transcript != transcript:
        raise ProtocolError("transcript", f"{sender} shared among another set of silos", silo=sender)
    if len(bundles.entries) != BUNDLE_BYTES * (len(joined) - 1):
        raise ProtocolError("bundle", f"{sender}'s bundles do not cover exactly the other silos", silo=sender)


def check_upload(terms: Terms, upload: Upload, transcript2: bytes, sender: str) -> None:
    """Made for this T2, and with the head of a privacy ledger where, and only where, the plan asks for one.

    Accuses nobody: a silo that was shown another list than the rest is not to blame.
    """
    if upload.transcript != transcript2:
        raise ProtocolError("transcript", f"{sender} masked for another set of silos")
    if len(upload.ledger) != (HASH_BYTES if terms.private else 0):
        raise ProtocolError("ledger", f"{sender} does not name the head of a ledger as the plan asks")


def joinable(ads: Mapping[str, Signed[KeyAd]], enough: int | None = None) -> list[str]:
    """The most silos that one attempt can hold, in the order of names; of equals, those that have agreed before.

    A silo that has agreed to a list of names over this model goes on with exactly these or not at all.
    From `enough` silos on that have not agreed, these go on by themselves.
    """
    bound = {name: tuple(ad.body.agreed) for name, ad in ads.items() if ad.body.agreed}
    free = tuple(sorted(set(ads) - set(bound)))
    if enough is not None and len(free) >= enough:
        return list(free)
    lists = {names for names in bound.values() if all(bound.get(name, names) == names for name in names)}
    complete = sorted(names for names in lists if set(names) <= set(ads))
    candidates: list[tuple[str, ...]] = [*complete, free]
    best = max(candidates, key=len)
    return list(best)


def check_bound(ads: Mapping[str, Signed[KeyAd]], names: Collection[str], *, final: bool) -> None:
    """Whether those of `names` that have agreed before can still go on; `final`: these are the survivors.

    Raises:
        ProtocolError: `agreed`; names a silo that cannot.
    """
    for name in names:
        agreed = set(ads[name].body.agreed)
        if agreed and (agreed != set(names) if final else not agreed <= set(names)):
            missing = ", ".join(sorted(agreed - set(names))) or "others"
            raise ProtocolError(
                "agreed", f"{name} agreed to the sum over {', '.join(sorted(agreed))} alone; {missing} dropped out"
            )
