"""Lists with messages that were forged, replayed, extended, or sent by who had dropped out: nothing follows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from fedclip_secure import canonical
from fedclip_secure.errors import ProtocolError
from fedclip_secure.secagg.messages import Agree, Body, Upload
from fedclip_secure.secagg.opening_checks import Position, check_opening
from tests.fakes import Attempt, Federation
from tests.secagg.lies import advance, before, replaced, signed, signed_with, under_a_lying_server

ME, PEER, COLLUDER = "silo-000", "silo-001", "silo-004"
ALL = [f"silo-{i:03d}" for i in range(5)]  # n = 5, c = 1: t and floor are 4
LISTS = {"share": "ads", "upload": "bundles", "agree": "uploads", "unmask": "agrees"}


def given(attempt: Attempt, stage: str, wires: Sequence[bytes]) -> object:
    """What ME gives for this list."""
    inbox = [attempt.server.inbox(ME)] if stage == "upload" else []
    return getattr(attempt.sessions[ME], stage)(wires, *inbox)


def refusal(attempt: Attempt, stage: str, wires: Sequence[bytes]) -> str:
    """The code with which ME stops at this list; at the true one it then stops too."""
    with pytest.raises(ProtocolError) as refused:
        given(attempt, stage, wires)
    with pytest.raises(ProtocolError, match="does not follow"):
        given(attempt, stage, attempt.wires(LISTS[stage]))
    return refused.value.code


@pytest.mark.parametrize("stage", LISTS)
def test_after_a_refusal_no_later_stage_gives_anything(stage: str) -> None:
    attempt = before(stage)
    assert refusal(attempt, stage, []) in ("floor", "agreement")
    attempt.alive.remove(ME)
    for name in list(LISTS)[list(LISTS).index(stage) :]:
        # A later stage lacks what the refused one would have made, and says so in one way or another.
        with pytest.raises((ProtocolError, AttributeError, ValueError)):
            given(attempt, name, attempt.wires(LISTS[name]))
        getattr(attempt, name)()


def body_of(attempt: Attempt, stage: str, silo: str) -> Body:
    body: Body = getattr(attempt.server, LISTS[stage])[silo].body
    return body


@pytest.mark.parametrize("stage", LISTS)
def test_a_second_certificate_for_a_name_signs_nothing_at_any_stage(stage: str) -> None:
    # The authority may certify as many keys for a name as it likes; one of them is pinned.
    attempt = before(stage)
    minted = signed(Federation(5), PEER, body_of(attempt, stage, PEER))
    assert refusal(attempt, stage, replaced(attempt.wires(LISTS[stage]), 1, minted)) == "signature"


@pytest.mark.parametrize("stage", LISTS)
def test_a_message_forged_under_another_silos_name_is_refused_at_every_stage(stage: str) -> None:
    attempt = before(stage)
    body, terms = body_of(attempt, stage, PEER), attempt.federation.terms
    envelope = {"v": 1, "type": body.type, "federation": terms.federation, "sender": PEER, "body": body.plain()}
    message = canonical.encode(envelope)
    label = b"fedclip/v1/" + body.type.encode() + b"\x00"
    forged = canonical.encode([message, attempt.federation.keys[COLLUDER].sign(label + message)])
    assert refusal(attempt, stage, replaced(attempt.wires(LISTS[stage]), 1, forged)) == "signature"


@pytest.mark.parametrize("stage", LISTS)
@pytest.mark.parametrize(
    ("code", "unsigned"),
    [
        ("message", lambda message: canonical.encode([message])),
        ("message", lambda message: message),
        ("signature", lambda message: canonical.encode([message, b""])),
        ("signature", lambda message: canonical.encode([message, bytes(64)])),
    ],
    ids=["alone in the list", "bare", "empty signature", "zeros for a signature"],
)
def test_unsigned_keys_and_unsigned_lists_are_refused(
    stage: str, code: str, unsigned: Callable[[bytes], bytes]
) -> None:
    attempt = before(stage)
    wires = attempt.wires(LISTS[stage])
    bare = unsigned(canonical.decode(wires[1])[0])
    assert refusal(attempt, stage, replaced(wires, 1, bare)) == code


def later(earlier: Attempt, stage: str) -> Attempt:
    """Another attempt over the same model; an honest server would not begin it where silos have agreed."""
    attempt = under_a_lying_server(earlier.federation, number=2, records=earlier.records)
    advance(attempt, stage)
    return attempt


REPLAYED = {"share": "base", "upload": "transcript", "agree": "transcript", "unmask": "agreement"}


@pytest.mark.parametrize("stage", REPLAYED)
def test_a_message_of_an_earlier_attempt_is_refused_at_every_stage(stage: str) -> None:
    # So a stage never starts again with what was sent in another context.
    earlier = before(stage)
    attempt = later(earlier, stage)
    old = earlier.wires(LISTS[stage])[1]
    assert refusal(attempt, stage, replaced(attempt.wires(LISTS[stage])[:4], 1, old)) == REPLAYED[stage]


@pytest.mark.parametrize("stage", ["share", "upload", "agree"])
def test_my_own_message_of_an_earlier_attempt_is_refused_at_every_stage(stage: str) -> None:
    earlier = before(stage)
    attempt = later(earlier, stage)
    old = earlier.wires(LISTS[stage])[0]
    assert refusal(attempt, stage, replaced(attempt.wires(LISTS[stage]), 0, old)) == "mine"


def test_shares_of_an_earlier_attempt_are_refused() -> None:
    earlier = before("upload")
    attempt = before("upload", earlier.federation, number=2)
    inbox = {**attempt.server.inbox(ME), PEER: earlier.server.inbox(ME)[PEER]}
    with pytest.raises(ProtocolError) as refused:
        attempt.sessions[ME].upload(attempt.wires("bundles"), inbox)
    assert (refused.value.code, refused.value.silo) == ("inbox", None)


@pytest.mark.parametrize("stage", LISTS)
@pytest.mark.parametrize("field", ["threshold", "neighbours", "floor", "x"])
def test_a_threshold_or_neighbours_in_a_message_are_refused_at_every_stage(stage: str, field: str) -> None:
    # There is nowhere to say them: t follows from the pinned roster, and every silo is everybody's neighbour.
    attempt = before(stage)
    more = signed_with(attempt.federation, COLLUDER, body_of(attempt, stage, COLLUDER), **{field: 1})
    assert refusal(attempt, stage, replaced(attempt.wires(LISTS[stage]), 4, more)) == "message"


@pytest.mark.parametrize("field", ["threshold", "neighbours", "min_silos", "colluding"])
def test_an_opening_that_chooses_threshold_or_neighbours_is_refused(field: str) -> None:
    federation = Federation(5)
    attempt = federation.attempt()
    wire = signed_with(federation, "aggregator", attempt.opening.ad, **{field: 1})
    with pytest.raises(ProtocolError) as refused:
        check_opening(federation.terms, Position(), wire, [])
    assert refused.value.code == "message"


def test_with_the_agreement_of_one_silo_nothing_goes_out() -> None:
    attempt = before("unmask")
    assert refusal(attempt, "unmask", attempt.wires("agrees")[:1]) == "agreement"


@pytest.mark.parametrize("field", ["mask_public", "share_seal", "salt_seal"])
def test_a_key_with_bit_255_set_is_refused(field: str) -> None:
    # X25519 ignores that bit, so the key would equal another one that has other bytes.
    attempt = before("share")
    good: bytes = getattr(attempt.server.ads[COLLUDER].body, field)
    bad = attempt.server.ads[COLLUDER].body.model_copy(update={field: good[:-1] + bytes([good[-1] | 0x80])})
    assert refusal(attempt, "share", replaced(attempt.wires("ads"), 4, signed(attempt.federation, COLLUDER, bad))) == (
        "key"
    )


def test_a_copied_key_is_refused_though_bit_255_tells_it_apart() -> None:
    attempt = before("share")
    victims = attempt.server.ads[ME].body.mask_public
    alike = victims[:-1] + bytes([victims[-1] | 0x80])
    bad = attempt.server.ads[COLLUDER].body.model_copy(update={"mask_public": alike})
    wires = replaced(attempt.wires("ads"), 4, signed(attempt.federation, COLLUDER, bad))
    assert refusal(attempt, "share", wires) == "key"


# Drop-outs that come back


@pytest.mark.parametrize(("dropped", "stage"), [("join", "upload"), ("join", "agree"), ("share", "agree")])
def test_a_drop_out_that_appears_in_a_later_list_is_refused(dropped: str, stage: str) -> None:
    attempt = before(stage, drop={dropped: {COLLUDER}})
    wires = attempt.wires(LISTS[stage])
    if stage == "upload":
        back: Body = attempt.server.bundles[PEER].body
    else:
        back = Upload(transcript=attempt.server.transcript2, vector=bytes(32), pairs=bytes(32))
    assert refusal(attempt, stage, [*wires, signed(attempt.federation, COLLUDER, back)]) == "list"


def test_the_agreement_of_a_drop_out_brings_nothing_of_it_back() -> None:
    # It is in the roster, so its word counts; but it is about a list without it.
    attempt = before("unmask", drop={"upload": {COLLUDER}})
    word = attempt.server.agrees[ME].body
    agrees = [*attempt.wires("agrees")[:3], signed(attempt.federation, COLLUDER, word)]
    answer = attempt.sessions[ME].unmask(agrees)
    attempt.server.receive_unmask(ME, attempt.server.open_unmask(ME, answer))
    shares = {share.peer: share.kind for share in attempt.server.unmasks[ME].body.shares}
    assert shares == {PEER: "b", "silo-002": "b", "silo-003": "b", COLLUDER: "seed"}


def test_a_peer_listed_twice_among_survivors_is_refused() -> None:
    attempt = before("agree")
    uploads = attempt.wires("uploads")
    assert refusal(attempt, "agree", [uploads[0], uploads[1], uploads[1], *uploads[2:]]) == "list"


# Too few


@pytest.mark.parametrize("stage", ["share", "upload", "agree"])
def test_a_sum_of_two_silos_under_honest_but_curious_is_refused(stage: str) -> None:
    federation = Federation(3, mode="honest_but_curious", colluding=0)
    assert federation.terms.threshold == 2
    attempt = before(stage, federation)
    assert refusal(attempt, stage, attempt.wires(LISTS[stage])[:2]) == "floor"


@pytest.mark.parametrize("stage", ["share", "upload", "agree"])
def test_a_list_of_the_victim_and_the_colluder_alone_is_refused(stage: str) -> None:
    attempt = before(stage)
    wires = attempt.wires(LISTS[stage])
    assert refusal(attempt, stage, [wires[0], wires[4]]) == "floor"


# The names that were agreed to before


def bound(stage: str) -> Attempt:
    """A second attempt; in the first one all agreed to the list without silo-002."""
    return later(before("unmask", drop={"upload": {"silo-002"}}), stage)


@pytest.mark.parametrize("stage", ["share", "upload", "agree"])
def test_after_agreeing_a_list_with_another_silo_in_place_of_an_agreed_one_is_refused(stage: str) -> None:
    attempt = bound(stage)
    wires = attempt.wires(LISTS[stage])
    assert refusal(attempt, stage, [wires[0], *wires[1:4]]) == "agreed"  # silo-002 for silo-004


def test_a_silo_says_what_it_agreed_to_and_the_server_cannot_unsay_it() -> None:
    attempt = bound("share")
    ad = attempt.server.ads[ME].body
    assert ad.agreed == [name for name in ALL if name != "silo-002"]
    free = signed(Federation(5), ME, ad.model_copy(update={"agreed": []}))
    assert refusal(attempt, "share", replaced(attempt.wires("ads"), 0, free)) == "signature"


@pytest.mark.parametrize("listed", [["silo-001"], ALL[::-1], [*ALL, ALL[-1]]], ids=["not itself", "unsorted", "twice"])
def test_an_impossible_list_of_agreed_names_is_refused(listed: list[str]) -> None:
    attempt = before("share")
    bad = attempt.server.ads[COLLUDER].body.model_copy(update={"agreed": listed})
    wires = replaced(attempt.wires("ads"), 4, signed(attempt.federation, COLLUDER, bad))
    assert refusal(attempt, "share", wires) == "list"


def test_a_silo_agrees_to_one_list_in_an_attempt_and_never_to_a_second() -> None:
    attempt = before("agree")
    me = attempt.sessions[ME]
    uploads = attempt.wires("uploads")
    me.agree(uploads[:4])
    with pytest.raises(ProtocolError) as refused:
        me.agree(uploads)
    assert refused.value.code == "order"
    assert attempt.records[ME].agreed == tuple(ALL[:4])


def test_agreements_about_a_list_that_i_did_not_sign_release_nothing() -> None:
    attempt = before("agree")
    me, uploads = attempt.sessions[ME], attempt.wires("uploads")
    me.agree(uploads[:4])
    others = [attempt.sessions[name].agree(uploads) for name in ALL[1:]]
    with pytest.raises(ProtocolError) as refused:
        me.unmask(others)
    assert refused.value.code == "agreement"


def test_an_agreement_made_of_the_servers_word_alone_is_refused() -> None:
    attempt = before("unmask")
    word: Agree = attempt.server.agrees[ME].body
    by_server = [signed(attempt.federation, "aggregator", word)] * 4
    assert refusal(attempt, "unmask", by_server) == "list"
