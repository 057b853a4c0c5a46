"""Parties whose contexts differ, be it in one bit: what follows is a refusal, or a sum that says nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip_secure.errors import ProtocolError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg import masks, sealing
from fedclip_secure.secagg.aggregator_session import Phase
from fedclip_secure.secagg.keys import Peer, SeedKeys, pair_commitment, self_key, share_commitment
from fedclip_secure.secagg.messages import (
    ServerAd,
    UploadHeader,
    base_hash,
    decode_body,
    sign_message,
    vector_hash,
)
from fedclip_secure.secagg.opening_checks import Position, check_opening
from fedclip_secure.secagg.sealing import SealKey
from fedclip_secure.secagg.silo_session import SiloSession
from fedclip_secure.secagg.terms import Terms, threshold
from tests.fakes import Attempt, Federation
from tests.secagg.lies import before, replaced
from tests.secagg.scenarios import SEED, WHICH, flipped, flipped_text

ME = "silo-000"
FOUR = Federation(4, parameters=3)
FOUR_OPENING = FOUR.opening()[0]


def other_terms(terms: Terms, what: str, which: int, bit: int) -> Terms:
    """What a silo pinned, but for one bit."""
    members = list(terms.roster.members)
    place = 1 + which % (len(members) - 1)  # a silo: the aggregator comes first
    name, key = members[place]
    match what:
        case "plan":
            return replace(terms, plan=flipped(terms.plan, bit))
        case "model":
            return replace(terms, initial_model=flipped(terms.initial_model, bit))
        case "federation":
            return replace(terms, federation=flipped_text(terms.federation, bit))
        case "key":
            members[place] = (name, flipped(key, bit))
        case "name":
            members[place] = (chr(ord(name[0]) ^ 1) + name[1:], key)
    return replace(terms, roster=Roster(tuple(sorted(members))))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["plan", "model", "federation", "key", "name"]), WHICH, st.integers(0, 255))
def test_a_silo_that_pinned_another_bit_joins_nothing(what: str, which: int, bit: int) -> None:
    pinned = other_terms(FOUR.terms, what, which, bit)
    codes = {"plan": "plan", "model": "chain", "federation": "message", "key": "roster", "name": "roster"}
    with pytest.raises(ProtocolError) as refused:
        check_opening(pinned, Position(), FOUR_OPENING, [])
    assert refused.value.code == codes[what]


AD_FIELDS = ("plan", "roster", "round", "attempt", "model", "nonce", "seal_public")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(AD_FIELDS), st.integers(0, 2**14))
def test_a_silo_that_was_shown_another_bit_of_the_opening_is_left_alone(name: str, bit: int) -> None:
    # The aggregator itself signs two openings, and shows one of them to one silo only.
    attempt = FOUR.attempt()
    honest = attempt.opening.ad
    value = getattr(honest, name)
    other = value ^ 1 << bit % 30 if isinstance(value, int) else flipped(value, bit)
    ad = ServerAd.model_construct(**{**honest.plain(), name: other})
    assert base_hash(ad) != attempt.opening.base
    wire = sign_message(ad, "test", AGGREGATOR, FOUR.keys[AGGREGATOR].sign)
    try:
        opening = check_opening(FOUR.terms, Position(), wire, [])
    except ProtocolError as refused:
        if refused.code not in {"plan", "roster", "chain", "replay", "key", "message"}:
            raise
        return
    victim = SiloSession(FOUR.terms, ME, FOUR.keys[ME].sign, opening, attempt.records[ME])
    theirs = victim.join()
    with pytest.raises(ProtocolError, match="keys for another attempt"):
        attempt.server.receive_key_ad(ME, theirs)
    ads = [theirs, *(attempt.sessions[name].join() for name in FOUR.silos[1:])]
    for session in (victim, attempt.sessions[FOUR.silos[1]]):
        with pytest.raises(ProtocolError) as ended:
            session.share(ads)
        assert ended.value.code == "base"


@st.composite
def partitions(draw: st.DrawFn) -> tuple[int, set[int], str]:
    """A federation's size, who is left off the list that one silo is shown, and of which stage."""
    size = draw(st.integers(4, 9))
    tolerated = size - threshold(size, "malicious", 1)
    left_off = draw(st.sets(st.integers(1, size - 1), min_size=1, max_size=tolerated))
    return size, left_off, draw(st.sampled_from(["key-ads", "bundles", "uploads"]))


@settings(max_examples=25, deadline=None)
@given(partitions())
def test_a_silo_that_was_shown_another_list_ends_in_a_refusal(partition: tuple[int, set[int], str]) -> None:
    size, left_off, kind = partition
    federation = Federation(size, parameters=3)
    mine = [index for index in range(size) if index not in left_off]
    witness = federation.silos[mine[-1]]
    {"key-ads": split_u1, "bundles": split_u2, "uploads": split_u3}[kind](federation, mine, witness)


def split_u1(federation: Federation, mine: list[int], witness: str) -> None:
    """Another T: neither takes the other's bundles."""
    attempt = before("share", federation)
    ads = attempt.wires("ads")
    bundles = [attempt.sessions[ME].share([ads[index] for index in mine]).bundles]
    bundles += [attempt.sessions[name].share(ads).bundles for name in federation.silos[1:]]
    for name, shown in ((ME, [bundles[index] for index in mine]), (witness, bundles)):
        refuses("transcript", partial(attempt.sessions[name].upload, shown, {}))


def split_u2(federation: Federation, mine: list[int], witness: str) -> None:
    """Another T2: the server refuses the upload, and if it did not, neither silo would agree to the other's."""
    attempt = before("upload", federation)
    bundles, server = attempt.wires("bundles"), attempt.server
    victims = attempt.sessions[ME].upload([bundles[index] for index in mine], server.inbox(ME))
    refuses("transcript", lambda: server.receive_upload(ME, victims.header, vector_hash(victims.words)))
    headers = [victims.header]
    headers += [attempt.sessions[name].upload(bundles, server.inbox(name)).header for name in federation.silos[1:]]
    uploads = [decode_body(UploadHeader, header).upload for header in headers]
    for name, shown in ((ME, [uploads[index] for index in mine]), (witness, uploads)):
        refuses("transcript", partial(attempt.sessions[name].agree, shown))


def split_u3(federation: Federation, mine: list[int], witness: str) -> None:
    """Another U3: the server refuses the agreement; and with it nobody finds t agreements of its own."""
    attempt = before("agree", federation)
    uploads = attempt.wires("uploads")
    victims = attempt.sessions[ME].agree([uploads[index] for index in mine])
    refuses("agreement", lambda: attempt.server.receive_agree(ME, victims))
    agrees = [victims, *(attempt.sessions[name].agree(uploads) for name in federation.silos[1:])]
    refuses("agreement", lambda: attempt.sessions[ME].unmask(agrees))
    refuses("agreement", lambda: attempt.sessions[witness].unmask(agrees[: federation.terms.threshold]))


def refuses(code: str, step: Callable[[], object]) -> None:
    with pytest.raises(ProtocolError) as refused:
        step()
    assert refused.value.code == code


Deliver = Callable[[Attempt, int, int], object]
FORGED = {"encoding", "message", "signature"}  # what a signed message with one bit changed may be


def one_flipped(wires: list[bytes], which: int, bit: int) -> list[bytes]:
    place = which % len(wires)
    return replaced(wires, place, flipped(wires[place], bit))


def flip_inbox(attempt: Attempt, which: int, bit: int) -> None:
    inbox = attempt.server.inbox(ME)
    sender = list(inbox)[which % len(inbox)]
    share, salt = inbox[sender]
    inbox[sender] = (flipped(share, bit), salt) if which & 1 else (share, flipped(salt, bit))
    attempt.sessions[ME].upload(attempt.wires("bundles"), inbox)


TO_THE_SILO: dict[str, tuple[str, Deliver]] = {
    "key-ads": ("share", lambda a, which, bit: a.sessions[ME].share(one_flipped(a.wires("ads"), which, bit))),
    "bundles": (
        "upload",
        lambda a, which, bit: a.sessions[ME].upload(one_flipped(a.wires("bundles"), which, bit), a.server.inbox(ME)),
    ),
    "inbox": ("upload", flip_inbox),
    "uploads": ("agree", lambda a, which, bit: a.sessions[ME].agree(one_flipped(a.wires("uploads"), which, bit))),
    "agrees": ("unmask", lambda a, which, bit: a.sessions[ME].unmask(one_flipped(a.wires("agrees"), which, bit))),
}


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(TO_THE_SILO)), WHICH, WHICH)
def test_one_bit_of_anything_that_the_server_hands_on_stops_the_silo(what: str, which: int, bit: int) -> None:
    stage, deliver = TO_THE_SILO[what]
    attempt = before(stage, FOUR)
    with pytest.raises(ProtocolError) as refused:
        deliver(attempt, which, bit)
    assert refused.value.code in ({"inbox"} if what == "inbox" else FORGED)


def flip_ciphertext(attempt: Attempt, which: int, bit: int) -> None:
    shares = attempt.sessions[ME].share(attempt.wires("ads"))
    peer = list(shares.ciphertexts)[which % 3]
    share, salt = shares.ciphertexts[peer]
    changed = (flipped(share, bit), salt) if which & 1 else (share, flipped(salt, bit))
    attempt.server.receive_bundles(ME, shares.bundles, {**shares.ciphertexts, peer: changed})


def flip_bundles(attempt: Attempt, which: int, bit: int) -> None:
    shares = attempt.sessions[ME].share(attempt.wires("ads"))
    attempt.server.receive_bundles(ME, flipped(shares.bundles, bit), shares.ciphertexts)


def flip_upload(attempt: Attempt, which: int, bit: int) -> None:
    upload = attempt.sessions[ME].upload(attempt.wires("bundles"), attempt.server.inbox(ME))
    sealed = b"".join(attempt.sessions[ME].seal_upload(upload).pieces(upload.body))
    opener = attempt.server.open_upload(ME)
    body = b"".join(opener.feed(flipped(sealed, bit)))
    opener.finish()
    assert opener.header is not None
    attempt.server.receive_upload(ME, opener.header, vector_hash(np.frombuffer(body, dtype="<u4")))


def flip_unmask(attempt: Attempt, which: int, bit: int) -> None:
    sealed = attempt.sessions[ME].unmask(attempt.wires("agrees"))
    attempt.server.open_unmask(ME, flipped(sealed, bit))


def flip_result(attempt: Attempt, which: int, bit: int) -> None:
    total = attempt.server.unmask_sum(attempt.vectors.values())
    attempt.server.compute_result(total, FOUR.model)
    wire, _ = attempt.sessions[ME].result(total, FOUR.model)
    attempt.server.receive_result(ME, flipped(wire, bit))


TO_THE_SERVER: dict[str, tuple[str, Deliver]] = {
    "key-ad": ("join", lambda a, which, bit: a.server.receive_key_ad(ME, flipped(a.sessions[ME].join(), bit))),
    "bundles": ("share", flip_bundles),
    "ciphertext": ("share", flip_ciphertext),
    "upload": ("upload", flip_upload),
    "agree": (
        "agree",
        lambda a, which, bit: a.server.receive_agree(ME, flipped(a.sessions[ME].agree(a.wires("uploads")), bit)),
    ),
    "unmask": ("unmask", flip_unmask),
    "result": ("result", flip_result),
}


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(TO_THE_SERVER)), WHICH, WHICH)
def test_one_bit_of_anything_that_a_silo_sends_is_refused(what: str, which: int, bit: int) -> None:
    stage, deliver = TO_THE_SERVER[what]
    attempt = before(stage, FOUR)
    with pytest.raises(ProtocolError) as refused:
        deliver(attempt, which, bit)
    sealed = {"ciphertext": {"bundle"}, "upload": {"seal", "length"}, "unmask": {"seal"}}
    assert refused.value.code in sealed.get(what, FORGED)
    assert ME not in attempt.server.answered(Phase[stage.upper()])


@dataclass
class View:
    """What one silo puts into its masks, by hand and without any check."""

    base: bytes
    pairs_transcript2: bytes
    self_transcript2: bytes
    seed: bytes
    b: bytes
    names: dict[str, str]  # as this silo writes them, its own included
    salts: dict[str, bytes] = field(default_factory=dict)  # as it received them
    publics: dict[str, bytes] = field(default_factory=dict)


def views(seed: int, silos: int) -> dict[str, View]:
    """Of silos that agree on everything."""
    rng, names = np.random.default_rng(seed), [f"silo-{i}" for i in range(silos)]
    base, transcript2 = rng.bytes(32), rng.bytes(32)
    made = {
        name: View(base, transcript2, transcript2, rng.bytes(32), rng.bytes(32), {n: n for n in names})
        for name in names
    }
    for name, view in made.items():
        keys = {peer: SeedKeys(base, made[peer].seed) for peer in names if peer != name}
        view.salts = {peer: key.salt_for(peer, name) for peer, key in keys.items()}
        view.publics = {peer: key.mask_public for peer, key in keys.items()}
    return made


def sum_of_views(seen: Mapping[str, View], agreed: Mapping[str, View], words: int = 4) -> list[int]:
    """Vectors of zeros, masked as `seen`, with the self masks taken off as everybody agreed on them."""
    total = np.zeros(words, dtype=np.uint32)
    for name, view in seen.items():
        keys, me = SeedKeys(view.base, view.seed), view.names[name]
        pairs = {
            peer: keys.pair_key(view.pairs_transcript2, me, Peer(view.names[peer], view.publics[peer], salt))
            for peer, salt in view.salts.items()
        }
        add = [self_key(view.b, view.self_transcript2, me), *(key for peer, key in pairs.items() if peer > name)]
        masks.apply(total, add, [key for peer, key in pairs.items() if peer < name])
        masks.apply(total, [], [self_key(agreed[name].b, agreed[name].self_transcript2, name)])
    return [int(word) for word in total]


@settings(max_examples=100, deadline=None)
@given(
    SEED,
    st.integers(3, 6),
    st.sampled_from(["base", "pairs_transcript2", "self_transcript2", "seed", "b", "names", "salts", "publics"]),
    WHICH,
    st.integers(0, 255),
)
def test_masks_from_contexts_that_differ_in_one_bit_do_not_cancel(
    seed: int, silos: int, what: str, which: int, bit: int
) -> None:
    agreed, seen = views(seed, silos), views(seed, silos)
    assert sum_of_views(seen, agreed) == [0, 0, 0, 0]
    victim = seen[f"silo-{which % silos}"]
    flip_in_view(victim, what, which, bit)
    assert sum_of_views(seen, agreed) != [0, 0, 0, 0]


def flip_in_view(view: View, what: str, which: int, bit: int) -> None:
    value = getattr(view, what)
    if isinstance(value, bytes):
        setattr(view, what, flipped(value, bit))
        return
    name = list(value)[which % len(value)]
    # RFC 7748: the topmost bit of a public key says nothing.
    value[name] = flipped_text(value[name], bit) if what == "names" else flipped(value[name], bit % 255)


INFO: tuple[str | bytes, ...] = ("fedclip/v1/label", bytes(range(32)), bytes(range(32, 64)), "silo-000", "silo-001")
SEALED_TO = SealKey.generate()
SEALED = sealing.seal(b"secret", SEALED_TO.public, *INFO)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(INFO) - 1), st.integers(0, 255))
def test_nothing_opens_under_a_context_that_differs_in_one_bit(which: int, bit: int) -> None:
    # T, T2, H(U3), label and both names: what sealed texts and commitments are bound to.
    info, part = list(INFO), INFO[which]
    info[which] = flipped(part, bit) if isinstance(part, bytes) else flipped_text(part, bit)
    assert SEALED_TO.open(SEALED, *INFO) == b"secret"
    with pytest.raises(ProtocolError) as refused:
        SEALED_TO.open(SEALED, *info)
    assert refused.value.code == "seal"


@settings(max_examples=60, deadline=None)
@given(SEED, st.integers(0, 255), st.booleans())
def test_commitments_differ_with_every_bit_of_transcript_and_secret(seed: int, bit: int, transcript: bool) -> None:
    rng = np.random.default_rng(seed)
    context, secret = rng.bytes(32), rng.bytes(32)
    other = (flipped(context, bit), secret) if transcript else (context, flipped(secret, bit))
    assert share_commitment(context, "a", "b", "b", secret) != share_commitment(other[0], "a", "b", "b", other[1])
    assert pair_commitment(context, "a", "b", secret) != pair_commitment(other[0], "a", "b", other[1])
