"""Rules for single messages and lists that both sides hold each other to."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedclip_secure.errors import ProtocolError
from fedclip_secure.secagg.messages import Bundles, KeyAd, Signed
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
    """Bundles made for this T, covering exactly U1 without the sender, in the order of names."""
    if bundles.transcript != transcript:
        raise ProtocolError("transcript", f"{sender} shared among another set of silos", silo=sender)
    if [entry.peer for entry in bundles.entries] != sorted(name for name in joined if name != sender):
        raise ProtocolError("bundle", f"{sender}'s bundles do not cover exactly the other silos", silo=sender)
