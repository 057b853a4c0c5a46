"""What a lying server shows to a silo, and what the silo refuses. c of its silos may collude: they sign anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedclip_secure.errors import ProtocolError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.secagg.messages import (
    BUNDLE_BYTES,
    Agree,
    Unmask,
    Upload,
    UploadHeader,
    decode_body,
    open_message,
)
from fedclip_secure.secagg.opening_checks import Position, check_opening
from fedclip_secure.secagg.silo_session import MaskedUpload, ModelRecord, SiloSession, Stage
from tests.fakes import Attempt, Federation
from tests.secagg.lies import (
    Sent,
    advance,
    before,
    let_lie,
    replaced,
    signed,
    under_a_lying_server,
    with_closing_round,
)

ME, PEER, COLLUDER = "silo-000", "silo-001", "silo-004"
ALL = [f"silo-{i:03d}" for i in range(5)]  # n = 5, c = 1: t and floor are 4


def refusal(call: Callable[..., object], *args: Any) -> ProtocolError:
    with pytest.raises(ProtocolError) as refused:
        call(*args)
    return refused.value


def code(call: Callable[..., object], *args: Any) -> str:
    return refusal(call, *args).code


# Stage 1: the list of keys


def joined() -> tuple[Attempt, SiloSession, list[bytes]]:
    attempt = before("share")
    return attempt, attempt.sessions[ME], attempt.wires("ads")


def colluding_ad(attempt: Attempt, **change: Any) -> bytes:
    ad = attempt.server.ads[COLLUDER].body.model_copy(update=change)
    return signed(attempt.federation, COLLUDER, ad)


def test_key_ads_below_the_floor_are_refused() -> None:
    _, me, ads = joined()
    assert code(me.share, ads[:3]) == "floor"


def test_key_ads_without_mine_are_refused() -> None:
    _, me, ads = joined()
    assert code(me.share, ads[1:]) == "mine"


def test_key_ads_with_another_of_mine_are_refused() -> None:
    attempt, me, ads = joined()
    other = attempt.session(ME).join()  # signed by me, in this attempt: what a snapshot that was restored would send
    assert code(me.share, replaced(ads, 0, other)) == "mine"


def test_key_ads_that_repeat_a_silo_or_are_unsorted_or_name_the_aggregator_are_refused() -> None:
    for mangle in (
        lambda ads, _: [*ads, ads[-1]],
        lambda ads, _: ads[::-1],
        lambda ads, by_aggregator: [by_aggregator, *ads],
    ):
        attempt, me, ads = joined()
        by_aggregator = signed(attempt.federation, AGGREGATOR, attempt.server.ads[PEER].body)
        assert code(me.share, mangle(ads, by_aggregator)) == "list"


def test_a_key_ad_by_a_key_that_is_not_pinned_is_refused() -> None:
    attempt, me, ads = joined()
    stranger = Federation(5)
    assert code(me.share, replaced(ads, 1, signed(stranger, PEER, attempt.server.ads[PEER].body))) == "signature"


def test_a_key_ad_of_another_attempt_is_refused_and_its_sender_named() -> None:
    attempt, me, ads = joined()
    old = attempt.federation.attempt(number=2)
    fault = refusal(me.share, replaced(ads, 1, old.sessions[PEER].join()))
    assert (fault.code, fault.silo) == ("base", PEER)


def test_a_message_of_another_type_in_the_list_is_refused() -> None:
    attempt, me, ads = joined()
    upload = Upload(transcript=bytes(32), vector=bytes(32), pairs=bytes(32))
    assert code(me.share, replaced(ads, 4, signed(attempt.federation, COLLUDER, upload))) == "message"


@pytest.mark.parametrize(
    "copied",
    ["mask key", "share key's X25519", "share key's ML-KEM", "own mask key", "whole salt key", "own share key"],
)
def test_a_key_that_stands_twice_is_refused_and_its_sender_named(copied: str) -> None:
    attempt, me, ads = joined()
    theirs, own = attempt.server.ads[ME].body, attempt.server.ads[COLLUDER].body
    change = {
        "mask key": {"mask_public": theirs.mask_public},
        "share key's X25519": {"share_seal": own.share_seal[:1184] + theirs.share_seal[1184:]},
        "share key's ML-KEM": {"share_seal": theirs.salt_seal[:1184] + own.share_seal[1184:]},
        "own mask key": {"mask_public": own.salt_seal[1184:]},
        "whole salt key": {"salt_seal": theirs.share_seal},
        "own share key": {"salt_seal": own.share_seal},
    }[copied]
    fault = refusal(me.share, replaced(ads, 4, colluding_ad(attempt, **change)))
    assert (fault.code, fault.silo) == ("key", COLLUDER)


@pytest.mark.parametrize("field", ["mask_public", "share_seal", "salt_seal"])
def test_a_key_of_low_order_is_refused_and_its_sender_named(field: str) -> None:
    attempt, me, ads = joined()
    good: bytes = getattr(attempt.server.ads[COLLUDER].body, field)
    fault = refusal(me.share, replaced(ads, 4, colluding_ad(attempt, **{field: good[:-32] + bytes(32)})))
    assert (fault.code, fault.silo) == ("key", COLLUDER)


def test_different_key_ads_for_different_silos_end_at_the_next_stage() -> None:
    attempt, me, ads = joined()
    shown_to_me = me.share(replaced(ads, 4, colluding_ad(attempt, self_commit=bytes(32))))
    for name in ALL[1:]:
        shares = attempt.sessions[name].share(ads)
        attempt.server.receive_bundles(name, shares.bundles, shares.ciphertexts)
    theirs = [attempt.server.bundles[name].wire for name in ALL[1:]]
    assert code(me.upload, [shown_to_me.bundles, *theirs], {}) == "transcript"
    assert code(attempt.sessions[PEER].upload, [shown_to_me.bundles, *theirs], {}) == "transcript"


# Stage 2: the list of bundles, and the inbox


def shared(lie: Callable[[str, Sent], Sent] | None = None) -> tuple[Attempt, SiloSession, list[bytes], Any]:
    attempt = Federation(5).attempt()
    if lie is not None:
        let_lie(attempt, COLLUDER, lie)
    advance(attempt, "upload")
    return attempt, attempt.sessions[ME], attempt.wires("bundles"), attempt.server.inbox(ME)


def colluding_bundles(attempt: Attempt, **change: Any) -> bytes:
    bundles = attempt.server.bundles[COLLUDER].body.model_copy(update=change)
    return signed(attempt.federation, COLLUDER, bundles)


def test_bundles_below_the_floor_are_refused() -> None:
    # A U2 of the victim alone, or of victim and colluders, would unmask the victim.
    _, me, bundles, inbox = shared()
    assert code(me.upload, bundles[:3], inbox) == "floor"


def test_bundles_without_mine_are_refused() -> None:
    _, me, bundles, inbox = shared()
    assert code(me.upload, bundles[1:], inbox) == "mine"


def test_bundles_with_others_of_mine_are_refused() -> None:
    attempt, me, bundles, inbox = shared()
    mine = attempt.server.bundles[ME].body
    other = mine.model_copy(update={"entries": mine.entries[:96] + bytes(32) + mine.entries[128:]})
    assert code(me.upload, replaced(bundles, 0, signed(attempt.federation, ME, other)), inbox) == "mine"


def test_a_silo_that_shared_without_having_joined_is_refused() -> None:
    attempt = before("upload", drop={"join": {COLLUDER}})
    # It copies another's bundles, so that only its not having joined is wrong.
    stranger = signed(attempt.federation, COLLUDER, attempt.server.bundles[PEER].body)
    me = attempt.sessions[ME]
    assert code(me.upload, [*attempt.wires("bundles"), stranger], attempt.server.inbox(ME)) == "list"


def test_bundles_over_another_list_of_keys_are_refused_and_their_sender_named() -> None:
    attempt, me, bundles, inbox = shared()
    fault = refusal(me.upload, replaced(bundles, 4, colluding_bundles(attempt, transcript=bytes(32))), inbox)
    assert (fault.code, fault.silo) == ("transcript", COLLUDER)


@pytest.mark.parametrize("fault", ["none", "one missing", "one twice", "a byte missing", "a byte besides"])
def test_bundles_that_do_not_cover_exactly_the_other_silos_are_refused(fault: str) -> None:
    attempt, me, bundles, inbox = shared()
    entries = attempt.server.bundles[COLLUDER].body.entries
    mangled = {
        "none": b"",
        "one missing": entries[:-BUNDLE_BYTES],
        "one twice": entries + entries[-BUNDLE_BYTES:],
        "a byte missing": entries[:-1],
        "a byte besides": entries + bytes(1),
    }[fault]
    refused = refusal(me.upload, replaced(bundles, 4, colluding_bundles(attempt, entries=mangled)), inbox)
    assert (refused.code, refused.silo) == ("bundle", COLLUDER)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("fault", ["bit", "withheld", "swapped", "another silo's"])
def test_an_altered_inbox_is_the_servers_fault_and_no_silo_is_accused(fault: str, part: int) -> None:
    _, me, bundles, inbox = shared()
    good = inbox[PEER]
    other = inbox["silo-002"][part]
    changed = {"bit": bytes([good[part][0] ^ 1]) + good[part][1:], "withheld": b"", "swapped": good[1 - part]}
    pair = list(good)
    pair[part] = changed.get(fault, other)
    refused = refusal(me.upload, bundles, {**inbox, PEER: (pair[0], pair[1])})
    assert (refused.code, refused.silo) == ("inbox", None)


def test_a_missing_inbox_is_the_servers_fault() -> None:
    _, me, bundles, _ = shared()
    assert code(me.upload, bundles, {}) == "inbox"


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


LIES: dict[str, Callable[[Sent], Sent]] = {
    "seed share not as committed": lambda s: Sent(flip(s.seed), s.b, s.salt, s.sealed),
    "b share not as committed": lambda s: Sent(s.seed, flip(s.b), s.salt, s.sealed),
    "the two shares exchanged": lambda s: Sent(s.seed, s.b, s.salt, s.b + s.seed),
    "shares too short": lambda s: Sent(s.seed, s.b[:31], s.salt, s.sealed[:63]),
    "shares too long": lambda s: Sent(s.seed, s.b + b"\x00", s.salt, s.sealed + b"\x00"),
    "no shares": lambda s: Sent(b"", b"", s.salt, b""),
    "salt too short": lambda s: Sent(s.seed, s.b, s.salt[:31], s.sealed),
    "salt too long": lambda s: Sent(s.seed, s.b, s.salt + b"\x00", s.sealed),
}


@pytest.mark.parametrize("fault", LIES)
def test_a_bundle_that_is_not_what_it_says_names_its_silo(fault: str) -> None:
    _, me, bundles, inbox = shared(lambda peer, sent: LIES[fault](sent) if peer == ME else sent)
    refused = refusal(me.upload, bundles, inbox)
    assert (refused.code, refused.silo) == ("bundle", COLLUDER)


def test_a_bundle_that_does_not_open_names_its_silo() -> None:
    attempt, me, bundles, inbox = shared()
    # Committed to, delivered as committed, and sealed to somebody else: the entry for another peer, relabelled.
    body = attempt.server.bundles[COLLUDER].body
    relabelled = body.entries[BUNDLE_BYTES : 2 * BUNDLE_BYTES] + body.entries[BUNDLE_BYTES:]
    wire = colluding_bundles(attempt, entries=relabelled)
    stolen = attempt.server.inbox(PEER)[COLLUDER]
    refused = refusal(me.upload, replaced(bundles, 4, wire), {**inbox, COLLUDER: stolen})
    assert (refused.code, refused.silo) == ("bundle", COLLUDER)


def test_only_the_silo_that_was_lied_to_complains() -> None:
    attempt, me, bundles, inbox = shared(lambda peer, sent: LIES["no shares"](sent) if peer == ME else sent)
    assert code(me.upload, bundles, inbox) == "bundle"
    attempt.sessions[PEER].upload(bundles, attempt.server.inbox(PEER))


# Stage 3: the list of survivors


def uploaded(**options: Any) -> tuple[Attempt, SiloSession, list[bytes]]:
    attempt = before("agree", **options)
    return attempt, attempt.sessions[ME], attempt.wires("uploads")


def test_uploads_below_the_floor_are_refused() -> None:
    _, me, uploads = uploaded()
    assert code(me.agree, uploads[:3]) == "floor"


def test_uploads_without_mine_are_refused() -> None:
    _, me, uploads = uploaded()
    assert code(me.agree, uploads[1:]) == "mine"


def test_uploads_with_another_of_mine_are_refused() -> None:
    attempt, me, uploads = uploaded()
    other = attempt.server.uploads[ME].body.model_copy(update={"vector": bytes(32)})
    assert code(me.agree, replaced(uploads, 0, signed(attempt.federation, ME, other))) == "mine"


def test_an_upload_of_a_silo_that_had_not_shared_is_refused() -> None:
    attempt, me, uploads = uploaded(drop={"share": {COLLUDER}})
    t2 = attempt.server.transcript2
    stranger = signed(attempt.federation, COLLUDER, Upload(transcript=t2, vector=bytes(32), pairs=bytes(32)))
    assert code(me.agree, [*uploads, stranger]) == "list"


def test_an_upload_over_another_list_is_refused_and_accuses_nobody() -> None:
    # An honest server would not have passed it on, and who was shown a false list is the victim.
    attempt, me, uploads = uploaded()
    other = signed(attempt.federation, COLLUDER, Upload(transcript=bytes(32), vector=bytes(32), pairs=bytes(32)))
    refused = refusal(me.agree, replaced(uploads, 4, other))
    assert (refused.code, refused.silo) == ("transcript", None)
    assert COLLUDER in str(refused)


def test_a_smaller_list_for_the_victim_alone_unmasks_nothing() -> None:
    # The server shows one silo a U2 without its colluder, and the others all five. The victim's vector then
    # has other masks than the others would help to take away.
    attempt = before("upload")
    me, bundles = attempt.sessions[ME], attempt.wires("bundles")
    victims = me.upload(bundles[:4], attempt.server.inbox(ME))
    for name in ALL[1:]:
        attempt.receive(name, attempt.sessions[name].upload(bundles, attempt.server.inbox(name)))
    mine = decode_body(UploadHeader, victims.header).upload
    uploads = [mine, *attempt.wires("uploads")][:4]
    for name in ALL[:4]:
        assert code(attempt.sessions[name].agree, uploads) == "transcript"


def test_a_refused_list_is_not_remembered_as_agreed() -> None:
    attempt, me, uploads = uploaded()
    assert code(me.agree, uploads[:3]) == "floor"
    assert attempt.records[ME].agreed is None


# Stage 4: the agreement


def agreed(**options: Any) -> tuple[Attempt, SiloSession, list[bytes]]:
    attempt = before("unmask", **options)
    return attempt, attempt.sessions[ME], attempt.wires("agrees")


def test_with_one_agreement_fewer_than_t_nothing_goes_out() -> None:
    _, me, agrees = agreed()
    assert code(me.unmask, agrees[:3]) == "agreement"


@pytest.mark.parametrize("field", ["transcript", "survivors"])
def test_an_agreement_over_something_else_does_not_count(field: str) -> None:
    attempt, me, agrees = agreed()
    other = attempt.server.agrees[PEER].body.model_copy(update={field: bytes(32)})
    forged = replaced(agrees[:4], 1, signed(attempt.federation, PEER, other))
    assert code(me.unmask, forged) == "agreement"


def test_one_silo_does_not_agree_twice_and_the_aggregator_not_once() -> None:
    attempt, me, agrees = agreed()
    assert code(me.unmask, [agrees[0], *agrees[:3]]) == "list"
    attempt, me, agrees = agreed()
    by_server = signed(attempt.federation, AGGREGATOR, attempt.server.agrees[ME].body)
    assert code(me.unmask, [by_server, *agrees[:3]]) == "list"


def test_two_lists_of_survivors_never_both_gather_t_agreements() -> None:
    # The colluder signs both lists; every honest silo signs the one it was shown.
    attempt = before("agree")
    uploads = attempt.wires("uploads")
    long, short = uploads, uploads[:4]
    signed_by = {name: attempt.sessions[name].agree(short if name < "silo-002" else long) for name in ALL[:4]}
    bodies = {
        name: open_message(wire, Agree, "test", attempt.federation.terms.roster).body
        for name, wire in signed_by.items()
    }
    for name in ALL[:4]:
        colluding = signed(attempt.federation, COLLUDER, bodies[name])
        same = [signed_by[other] for other in ALL[:4] if bodies[other] == bodies[name]]
        assert code(attempt.sessions[name].unmask, [*same, colluding]) == "agreement"


def released(attempt: Attempt, silo: str = ME) -> Unmask:
    sealed = attempt.sessions[silo].unmask(attempt.wires("agrees"))
    wire = attempt.server.open_unmask(silo, sealed)
    return open_message(wire, Unmask, "test", attempt.federation.terms.roster).body


def test_exactly_one_share_of_each_peer_goes_out_of_b_if_it_survived_else_of_seed() -> None:
    attempt, _, _ = agreed(drop={"upload": {"silo-002"}})
    answer = released(attempt)
    assert [(share.peer, share.kind) for share in answer.shares] == [
        ("silo-001", "b"),
        ("silo-002", "seed"),
        ("silo-003", "b"),
        ("silo-004", "b"),
    ]
    assert [pair.peer for pair in answer.pairs] == ["silo-002"]


def test_no_pair_key_of_a_survivor_goes_out() -> None:
    attempt, _, _ = agreed()
    assert released(attempt).pairs == []


def test_what_is_released_is_sealed_to_the_key_of_the_opening() -> None:
    attempt, me, agrees = agreed()
    sealed = me.unmask(agrees)
    other = before("unmask", attempt.federation)
    assert code(other.server.open_unmask, ME, sealed) == "seal"


# Two attempts over one model


def second_attempt(first: Attempt, stage: str, **options: Any) -> Attempt:
    """An honest server would not even try: silos say in their `KeyAd` what they agreed to."""
    later = under_a_lying_server(first.federation, number=2, records=first.records, **options)
    advance(later, stage)
    return later


def test_after_agreeing_no_other_names_are_signed_over_this_model() -> None:
    # Abandon, then the same vectors over one silo more: the difference of the sums would be that silo's update.
    first, _, _ = agreed(drop={"upload": {"silo-002"}})
    later = second_attempt(first, "agree")
    uploads = later.wires("uploads")
    for name in ("silo-000", "silo-001", "silo-003", "silo-004"):
        assert code(later.sessions[name].agree, uploads) == "agreed"


def test_after_agreeing_one_silo_fewer_is_refused_too() -> None:
    first, _, _ = agreed()
    later = second_attempt(first, "agree", drop={"upload": {"silo-002"}})
    assert code(later.sessions[ME].agree, later.wires("uploads")) == "agreed"


def test_after_agreeing_the_same_names_are_signed_again_and_give_the_same_sum() -> None:
    first = before("result", drop={"upload": {"silo-002"}})
    first.result()
    later = second_attempt(first, "result", drop={"upload": {"silo-002"}})
    later.result()
    assert later.total.tolist() == first.total.tolist()
    assert [later.vectors[name].tolist() for name in later.vectors] != [
        first.vectors[name].tolist() for name in later.vectors
    ]


def test_a_refused_list_leaves_the_agreed_one_in_place() -> None:
    first, _, _ = agreed()
    later = second_attempt(first, "agree", drop={"upload": {"silo-002"}})
    assert code(later.sessions[ME].agree, later.wires("uploads")) == "agreed"
    assert first.records[ME].agreed == tuple(ALL)


def test_before_agreeing_another_attempt_is_free_to_have_other_names() -> None:
    first = before("agree")
    later = second_attempt(first, "result", drop={"upload": {"silo-002"}})
    later.result()
    assert first.records[ME].agreed == tuple(name for name in ALL if name != "silo-002")


def test_no_key_commitment_or_masked_word_is_used_in_two_attempts() -> None:
    first = before("agree")
    later = second_attempt(first, "agree")
    for name in ALL:
        one, two = first.server.ads[name].body, later.server.ads[name].body
        fields = ("base", "mask_public", "share_seal", "salt_seal", "self_commit")
        assert all(getattr(one, field) != getattr(two, field) for field in fields)
        assert np.count_nonzero(first.vectors[name] == later.vectors[name]) < 3


def test_a_masked_vector_does_not_show_the_update() -> None:
    federation = Federation(3, parameters=4096)
    zero = np.zeros(4096, dtype=np.uint32)
    records = {name: federation.record(update=zero) for name in federation.silos}
    attempt = before("agree", federation, records=records)
    for words in attempt.vectors.values():
        # Uniform words: the mean of 4,096 lies within 6 standard errors of the middle.
        assert abs(words.astype(np.float64).mean() / 2**32 - 0.5) < 6 * (1 / 12 / words.size) ** 0.5
        assert np.unique(words).size > 4090


# Order


CALLS: dict[str, Callable[[SiloSession], object]] = {
    "join": lambda silo: silo.join(),
    "share": lambda silo: silo.share([]),
    "upload": lambda silo: silo.upload([], {}),
    "agree": lambda silo: silo.agree([]),
    "unmask": lambda silo: silo.unmask([]),
    "result": lambda silo: silo.result(np.zeros(11, dtype=np.uint32), Federation(3).model),
}


@pytest.mark.parametrize("reached", range(7))
def test_no_stage_is_skipped_or_repeated(reached: int) -> None:
    stages = list(CALLS)
    attempt = before("result")
    attempt.result()
    if reached < 6:
        attempt = before(stages[reached])
    for index, (name, call) in enumerate(CALLS.items()):
        if index != reached:
            assert code(call, attempt.sessions[ME]) == "order", name
    assert attempt.sessions[ME].stage == Stage(reached)


@pytest.mark.parametrize("stage", ["share", "upload", "agree", "unmask"])
def test_a_stage_that_failed_is_never_tried_again(stage: str) -> None:
    attempt = before(stage)
    me = attempt.sessions[ME]
    lists = {"share": "ads", "upload": "bundles", "agree": "uploads", "unmask": "agrees"}
    good: list[Any] = [attempt.wires(lists[stage]), *([attempt.server.inbox(ME)] if stage == "upload" else [])]
    bad: list[Any] = [[], *good[1:]]
    assert code(getattr(me, stage), *bad) in ("floor", "agreement")
    assert code(getattr(me, stage), *good) == "order"
    for name, call in CALLS.items():
        assert code(call, me) == "order", f"{name} followed a stage that was refused"


def test_a_vector_for_another_model_or_plan_is_not_sent() -> None:
    federation = Federation(5)
    attempt = federation.attempt()
    good = federation.record()
    attempt.records[ME] = ModelRecord(bytes(32), good.open_vector)
    with pytest.raises(ValueError, match="belongs to another model"):
        attempt.session(ME)
    attempt.records[ME] = ModelRecord(good.model, lambda: good.open_vector()[:-1])
    attempt.sessions[ME] = attempt.session(ME)
    with pytest.raises(ValueError, match="belongs to another plan"):
        advance(attempt, "agree")


# Stage 5: the sum


def finished(federation: Federation | None = None, **options: Any) -> tuple[Attempt, SiloSession]:
    attempt = before("result", federation, **options)
    attempt.total = attempt.server.unmask_sum(attempt.vectors[name] for name in attempt.server.uploads)
    return attempt, attempt.sessions[ME]


@pytest.mark.parametrize(
    ("word", "value"), [(0, 2**30), (-3, 0), (-3, 4), (-3, 5001), (-2, 26), (-1, 2**31 + 5)], ids=str
)
def test_a_sum_that_honest_silos_cannot_have_is_not_signed(word: int, value: int) -> None:
    attempt, me = finished()
    attempt.total[word] = value
    assert code(me.result, attempt.total, attempt.federation.model) == "sum-bounds"


def test_the_next_model_is_not_computed_from_another_than_the_openings() -> None:
    attempt, me = finished()
    other = AdapterState(attempt.federation.model.layout, attempt.federation.model.vector + 1)
    with pytest.raises(ValueError, match="did not start from this model"):
        me.result(attempt.total, other)


def test_a_closing_round_that_moves_the_model_is_not_signed() -> None:
    federation = with_closing_round(Federation(5))
    attempt, me = finished(federation)
    assert code(me.result, attempt.total, federation.model) == "sum-bounds"


def test_a_closing_round_counts_and_leaves_the_model_as_it_is() -> None:
    federation = with_closing_round(Federation(5))
    still = np.zeros(federation.parameters, dtype=np.uint32)
    records = {name: federation.record(update=still) for name in federation.silos}
    outcome = federation.attempt(records=records).run()
    assert outcome.model.digest == federation.model.digest
    assert (outcome.correct, outcome.total) == (15, 25)


def test_a_different_sum_for_one_silo_gives_a_result_that_t_silos_do_not_share() -> None:
    attempt, me = finished()
    attempt.server.compute_result(attempt.total, attempt.federation.model)
    shifted = attempt.total.copy()
    shifted[0] ^= 1
    wire, _ = me.result(shifted, attempt.federation.model)
    assert code(attempt.server.receive_result, ME, wire) == "result"


def test_an_upload_is_sealed_to_the_key_of_the_opening() -> None:
    attempt = before("upload")
    upload: MaskedUpload = attempt.sessions[ME].upload(attempt.wires("bundles"), attempt.server.inbox(ME))
    sealed = b"".join(attempt.sessions[ME].seal_upload(upload).pieces(upload.body))
    other = before("upload", attempt.federation)
    assert code(lambda: list(other.server.open_upload(ME).feed(sealed))) == "seal"
    assert code(lambda: list(attempt.server.open_upload(PEER).feed(sealed))) == "seal"


@pytest.mark.parametrize("position", [Position(), Position(1, 1, None)], ids=["a late silo", "who was in it"])
def test_after_a_training_round_that_moves_nothing_no_silo_joins_another_over_the_model(position: Position) -> None:
    federation = Federation(5)
    still = np.zeros(federation.parameters, dtype=np.uint32)
    attempt = federation.attempt(records={name: federation.record(update=still) for name in federation.silos})
    assert attempt.run().model.digest == federation.model.digest
    again, _ = federation.opening(round_number=2, attempt=2)
    at = replace(position, model=federation.model.digest if position.round else None)
    with pytest.raises(ProtocolError, match="round 1 changed no parameter") as refused:
        check_opening(federation.terms, at, again, attempt.wires("results"))
    assert refused.value.code == "chain"
