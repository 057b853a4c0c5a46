from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedclip_secure import canonical
from fedclip_secure.errors import ProtocolError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.secagg.messages import (
    Agree,
    Body,
    Complaint,
    KeyAd,
    PeerShare,
    Result,
    Unmask,
    Upload,
    Void,
    by_sender,
    join_transcript,
    open_message,
    share_transcript,
    sign_message,
    survivors_hash,
)
from tests.fakes import Federation
from tests.secagg.lies import before, signed

FEDERATION = Federation(3)
ROSTER = FEDERATION.terms.roster
AGREE = Agree(transcript=bytes(32), survivors=b"\x01" * 32)
ENVELOPE = {"v": 1, "type": "agree", "federation": "test", "sender": "silo-000", "body": AGREE.plain()}


def wire_of(envelope: Any, signer: str = "silo-000", kind: str = "agree") -> bytes:
    """A correctly signed message of any content."""
    data = canonical.encode(envelope)
    return canonical.encode([data, FEDERATION.keys[signer].sign(b"fedclip/v1/" + kind.encode() + b"\x00" + data)])


def refusal(wire: bytes, model: type[Body] = Agree, federation: str = "test") -> str:
    with pytest.raises(ProtocolError) as refused:
        open_message(wire, model, federation, ROSTER)
    return refused.value.code


def test_a_message_opens_as_it_was_signed() -> None:
    wire = signed(FEDERATION, "silo-001", AGREE)
    opened = open_message(wire, Agree, "test", ROSTER)
    assert (opened.sender, opened.body, opened.wire) == ("silo-001", AGREE, wire)


def test_the_signature_is_over_label_type_zero_and_bytes() -> None:
    assert open_message(wire_of(ENVELOPE), Agree, "test", ROSTER).body == AGREE
    assert wire_of(ENVELOPE) == sign_message(AGREE, "test", "silo-000", FEDERATION.keys["silo-000"].sign)


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"v": True},
        {"v": 1.0},
        {"v": "1"},
        {"type": "upload"},
        {"type": None},
        {"federation": "other"},
        {"federation": b"test"},
        {"extra": 1},
        {"body": None},
        {"body": [bytes(32), bytes(32)]},
        {"body": {"transcript": bytes(32)}},
        {"body": {**AGREE.plain(), "more": 1}},
        {"body": {**AGREE.plain(), "transcript": bytes(31)}},
        {"body": {**AGREE.plain(), "transcript": "0" * 32}},
        {"body": {**AGREE.plain(), "survivors": None}},
    ],
)
def test_another_envelope_or_body_is_refused_though_well_signed(change: dict[str, Any]) -> None:
    assert refusal(wire_of({**ENVELOPE, **change})) == "message"


@pytest.mark.parametrize("sender", ["silo-001", "stranger", "", None, 7, ["silo-000"], {"a": 1}])
def test_a_sender_that_did_not_sign_is_refused(sender: object) -> None:
    assert refusal(wire_of({**ENVELOPE, "sender": sender})) == "signature"


def test_a_signature_under_another_type_is_refused() -> None:
    # Upload and Agree have bodies of the same shape; only the label before the bytes tells them apart.
    assert refusal(wire_of(ENVELOPE, kind="upload")) == "signature"
    upload = Upload(transcript=bytes(32), vector=bytes(32), pairs=bytes(32))
    assert refusal(signed(FEDERATION, "silo-000", upload)) == "message"


def test_every_changed_byte_of_a_message_is_refused() -> None:
    wire = bytearray(signed(FEDERATION, "silo-000", AGREE))
    for index in range(len(wire)):
        wire[index] ^= 1 << index % 8
        assert refusal(bytes(wire)) in ("encoding", "message", "signature")
        wire[index] ^= 1 << index % 8


@pytest.mark.parametrize("outer", [[], [b""], [b"", b"", b""], ["", b""], {"a": b""}, None, 1])
def test_other_outer_shapes_are_refused(outer: object) -> None:
    assert refusal(canonical.encode(outer)) == "message"


def test_bytes_that_are_not_canonical_are_refused_though_well_signed() -> None:
    data = canonical.encode(ENVELOPE)
    loose = b"\xb8\x05" + data[1:]  # the map's length in two bytes
    signature = FEDERATION.keys["silo-000"].sign(b"fedclip/v1/agree\x00" + loose)
    assert refusal(canonical.encode([loose, signature])) == "encoding"
    assert refusal(signed(FEDERATION, "silo-000", AGREE) + b"\x00") == "encoding"


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (Result, {"round": 0}),
        (Result, {"round": True}),
        (Result, {"round": 2**31}),
        (Result, {"correct": -1}),
        (Result, {"total": 1.0}),
        (Complaint, {"accused": "UPPER"}),
        (Complaint, {"accused": "bern\n"}),
        (Complaint, {"accused": "a" * 64}),
        (Complaint, {"code": "x" * 33}),
        (Void, {"reason": "x" * 1001}),
    ],
)
def test_values_outside_their_bounds_are_refused(model: type[Body], body: dict[str, Any]) -> None:
    good: dict[type[Body], dict[str, Any]] = {
        Result: {
            "plan": bytes(32),
            "roster": bytes(32),
            "start": bytes(32),
            "round": 1, "transcript": bytes(32), "survivors": bytes(32), "sum": bytes(32), "model": bytes(32),
            "correct": 0, "total": 0,
        },
        Complaint: {"transcript": bytes(32), "accused": "bern", "code": "bundle"},
        Void: {"transcript": bytes(32), "reason": "out of bounds"},
    }  # fmt: skip
    envelope = {**ENVELOPE, "type": model.type, "body": good[model]}
    open_message(wire_of(envelope, kind=model.type), model, "test", ROSTER)
    envelope["body"] = {**good[model], **body}
    assert refusal(wire_of(envelope, kind=model.type), model) == "message"


@pytest.mark.parametrize("kind", ["both", "", None])
def test_a_share_of_no_known_kind_is_refused(kind: object) -> None:
    share = {"peer": "bern", "kind": kind, "share": bytes(32)}
    body = {"transcript": bytes(32), "survivors": bytes(32), "b": bytes(32), "shares": [share], "pairs": []}
    assert refusal(wire_of({**ENVELOPE, "type": "unmask", "body": body}, kind="unmask"), Unmask) == "message"


def test_more_shares_than_there_can_be_peers_are_refused() -> None:
    share = PeerShare(peer="bern", kind="b", share=bytes(32)).plain()
    body = {"transcript": bytes(32), "survivors": bytes(32), "b": bytes(32), "shares": [share] * 255, "pairs": []}
    assert refusal(wire_of({**ENVELOPE, "type": "unmask", "body": body}, kind="unmask"), Unmask) == "message"


def test_a_list_is_sorted_without_repeats_and_of_silos_alone() -> None:
    wires = [signed(FEDERATION, name, AGREE) for name in FEDERATION.silos]
    assert list(by_sender(wires, Agree, "test", ROSTER)) == list(FEDERATION.silos)
    for bad in (wires[::-1], [wires[0], wires[0]], [signed(FEDERATION, AGGREGATOR, AGREE), *wires]):
        with pytest.raises(ProtocolError) as refused:
            by_sender(bad, Agree, "test", ROSTER)
        assert refused.value.code == "list"


def test_transcripts_bind_every_byte_of_every_body_and_no_signature() -> None:
    attempt = before("agree", Federation(3))
    server, base = attempt.server, attempt.opening.base
    first, t = server.ads["silo-000"], join_transcript(base, server.ads)
    other = first.body.model_copy(update={"self_commit": bytes(32)})
    wire = signed(attempt.federation, "silo-000", other)
    changed = {**server.ads, "silo-000": open_message(wire, KeyAd, "test", attempt.federation.terms.roster)}
    resigned = {**server.ads, "silo-000": replace(first, wire=b"another wire")}
    assert join_transcript(base, changed) != t == join_transcript(base, resigned)
    assert join_transcript(bytes(32), server.ads) != t
    fewer = {name: message for name, message in server.bundles.items() if name != "silo-002"}
    assert share_transcript(t, fewer) != share_transcript(t, server.bundles)
    uploads = {name: message for name, message in server.uploads.items() if name != "silo-002"}
    assert survivors_hash(bytes(32), uploads) != survivors_hash(bytes(32), server.uploads)


def test_transcripts_do_not_depend_on_the_order_of_arrival() -> None:
    server = before("share", Federation(3)).server
    backwards = dict(reversed(server.ads.items()))
    assert join_transcript(bytes(32), backwards) == join_transcript(bytes(32), server.ads)


@pytest.mark.parametrize("envelope", [sorted(ENVELOPE), 1, None, "text", b"bytes", []])
def test_an_envelope_that_is_no_map_is_refused_though_well_signed(envelope: object) -> None:
    assert refusal(wire_of(envelope)) == "message"
