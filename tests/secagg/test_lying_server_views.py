"""Different lists for different silos, in every way to split them: no two views are both unmasked.

The colluder goes along with every view: it signs whatever the server needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np
import pytest

from fedclip_secure.errors import ProtocolError
from fedclip_secure.secagg import masks
from fedclip_secure.secagg.keys import self_key
from fedclip_secure.secagg.masks import expand
from fedclip_secure.secagg.messages import (
    Agree,
    Bundles,
    Unmask,
    Upload,
    UploadHeader,
    by_sender,
    decode_body,
    open_message,
    share_transcript,
)
from fedclip_secure.secagg.silo_session import MaskedUpload
from fedclip_secure.secagg.unmasking import reveal
from tests.fakes import Attempt, Federation
from tests.secagg.lies import LyingServer, before, replaced, signed, under_a_lying_server

ME, COLLUDER = "silo-000", "silo-004"
HONEST = [f"silo-{i:03d}" for i in range(4)]  # n = 5, c = 1: t and floor are 4
View = Mapping[str, bool]  # honest silo: whether it is shown the second list


def splits() -> Iterator[View]:
    """Every way to show one list to some of the honest silos and another to the rest."""
    for count in range(1, 4):
        for second in combinations(HONEST[1:], count):
            yield {name: name in second for name in HONEST}


def ids(view: View) -> str:
    return "".join(str(int(second)) for second in view.values())


SPLITS = pytest.mark.parametrize("view", list(splits()), ids=ids)


def stop(call: object, *args: object) -> str:
    assert callable(call)
    with pytest.raises(ProtocolError) as refused:
        call(*args)
    return refused.value.code


def upload_of(masked: MaskedUpload) -> bytes:
    return decode_body(UploadHeader, masked.header).upload


# Joining


def shared_in_two_views(view: View) -> Attempt:
    """Some silos are shown other keys of the colluder than the rest, and all have shared."""
    attempt = before("share")
    ads, other = attempt.wires("ads"), attempt.server.ads[COLLUDER].body.model_copy(update={"self_commit": bytes(32)})
    lists = {False: ads, True: replaced(ads, 4, signed(attempt.federation, COLLUDER, other))}
    attempt.server = LyingServer.of(attempt.server)
    for name in HONEST:
        shares = attempt.sessions[name].share(lists[view[name]])
        attempt.server.receive_bundles(name, shares.bundles, shares.ciphertexts)
    return attempt


def colluders_bundles(attempt: Attempt, like: str) -> bytes:
    """The colluder's, for the keys that `like` was shown."""
    return signed(attempt.federation, COLLUDER, attempt.server.bundles[like].body)


@SPLITS
def test_silos_that_were_shown_different_keys_do_not_mask(view: View) -> None:
    attempt = shared_in_two_views(view)
    for name in HONEST:
        bundles = [*attempt.wires("bundles"), colluders_bundles(attempt, name)]
        assert stop(attempt.sessions[name].upload, bundles, attempt.server.inbox(name)) == "transcript"


@SPLITS
def test_silos_that_were_shown_different_keys_are_too_few_among_themselves(view: View) -> None:
    attempt = shared_in_two_views(view)
    for name in HONEST:
        same = [attempt.server.bundles[other].wire for other in HONEST if view[other] == view[name]]
        shown = [*same, colluders_bundles(attempt, name)]
        if len(shown) < 4:
            assert stop(attempt.sessions[name].upload, shown, attempt.server.inbox(name)) == "floor"


# Sharing


def uploaded_in_two_views(view: View) -> tuple[Attempt, dict[str, MaskedUpload]]:
    """Some silos are shown a U2 without the colluder, and all have masked."""
    attempt = before("upload")
    bundles = attempt.wires("bundles")
    lists = {False: bundles, True: bundles[:4]}
    masked = {name: attempt.sessions[name].upload(lists[view[name]], attempt.server.inbox(name)) for name in HONEST}
    return attempt, masked


def colluders_upload(attempt: Attempt, like: MaskedUpload) -> bytes:
    body = open_message(upload_of(like), Upload, "test", attempt.federation.terms.roster).body
    return signed(attempt.federation, COLLUDER, body)


@SPLITS
def test_silos_that_were_shown_different_bundles_agree_to_nothing(view: View) -> None:
    attempt, masked = uploaded_in_two_views(view)
    shown = [upload_of(masked[name]) for name in HONEST]
    for name in HONEST:
        assert stop(attempt.sessions[name].agree, shown) == "transcript"
        assert attempt.records[name].agreed is None


@SPLITS
def test_of_silos_that_were_shown_different_bundles_one_view_at_most_can_agree(view: View) -> None:
    attempt, masked = uploaded_in_two_views(view)
    going_on = set()
    for name in HONEST:
        colluding = [] if view[name] else [colluders_upload(attempt, masked[name])]  # it is not in the shorter U2
        shown = [*(upload_of(masked[other]) for other in HONEST if view[other] == view[name]), *colluding]
        if len(shown) < 4:
            assert stop(attempt.sessions[name].agree, shown) == "floor"
        else:
            attempt.sessions[name].agree(shown)
            going_on.add(view[name])
    assert len(going_on) <= 1


# Uploading


def agreed_in_two_views(view: View) -> tuple[Attempt, dict[str, bytes]]:
    """Some silos are shown survivors without the colluder, and all have signed what they were shown."""
    attempt = before("agree")
    uploads = attempt.wires("uploads")
    lists = {False: uploads, True: uploads[:4]}
    return attempt, {name: attempt.sessions[name].agree(lists[view[name]]) for name in HONEST}


@SPLITS
def test_of_two_lists_of_survivors_one_at_most_is_unmasked(view: View) -> None:
    attempt, agrees = agreed_in_two_views(view)
    released = set()
    for name in HONEST:
        word = open_message(agrees[name], Agree, "test", attempt.federation.terms.roster).body
        same = [agrees[other] for other in HONEST if view[other] == view[name]]
        shown = [*same, signed(attempt.federation, COLLUDER, word)]
        if len(shown) < 4:
            assert stop(attempt.sessions[name].unmask, shown) == "agreement"
        else:
            attempt.sessions[name].unmask(shown)
            released.add(view[name])
    assert len(released) <= 1


@SPLITS
def test_agreements_to_two_lists_do_not_add_up(view: View) -> None:
    attempt, agrees = agreed_in_two_views(view)
    for name in HONEST:
        assert stop(attempt.sessions[name].unmask, [agrees[other] for other in HONEST]) == "agreement"


# Agreeing


def test_different_agreements_to_one_list_release_the_same_sum() -> None:
    attempt = before("unmask")
    agrees = attempt.wires("agrees")
    for index, name in enumerate([*HONEST, COLLUDER]):
        shown = [wire for other, wire in enumerate(agrees) if other != index]
        attempt.server.receive_unmask(name, attempt.server.open_unmask(name, attempt.sessions[name].unmask(shown)))
    attempt.server.close()
    attempt.result()
    plain = np.sum([attempt.records[name].open_vector() for name in attempt.federation.silos], axis=0, dtype=np.uint32)
    assert attempt.total.tolist() == plain.tolist()


def test_a_silo_that_is_shown_too_few_agreements_stops_alone() -> None:
    attempt = before("unmask")
    assert stop(attempt.sessions[ME].unmask, attempt.wires("agrees")[1:4]) == "agreement"
    attempt.alive.remove(ME)
    attempt.unmask()
    assert {share.kind for u in attempt.server.unmasks.values() for share in u.body.shares} == {"b"}


# A drop-out whose secret was given away


def without_pair_masks(attempt: Attempt, late: MaskedUpload, silo: str) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """What a server gets out of a vector when it knows the seed of its silo and what was sealed to it."""
    session = attempt.sessions[silo]
    keys = session._pair_keys
    words = late.words.copy()
    masks.apply(
        words,
        add=[key for peer, key in keys.items() if peer < silo],
        subtract=[key for peer, key in keys.items() if peer > silo],
    )
    return words


def test_an_upload_that_comes_after_its_silo_was_declared_dropped_stays_masked() -> None:
    late = "silo-002"
    attempt = before("upload", drop={"upload": {late}})
    masked = attempt.sessions[late].upload(attempt.wires("bundles"), attempt.server.inbox(late))
    for stage in ("upload", "agree", "unmask"):
        getattr(attempt, stage)()
    known = reveal(attempt.server._evidence()).pairs
    assert {survivor: keys[late] for survivor, keys in known.items()} == attempt.sessions[late]._pair_keys
    q, mine = (
        attempt.records[late].open_vector(),
        self_key(attempt.sessions[late].secrets.b, attempt.server.transcript2, late),
    )
    left = without_pair_masks(attempt, masked, late) - q
    assert left.tolist() == expand(mine, q.size).tolist(), "one mask is left on it, and nobody has given away its key"
    answers: list[Unmask] = [message.body for message in attempt.server.unmasks.values()]
    assert not [share for answer in answers for share in answer.shares if share.peer == late and share.kind == "b"]


def test_a_victim_that_was_shown_a_smaller_list_and_is_then_declared_dropped_stays_masked() -> None:
    # The rest goes on without it and gives away its seed; its vector was masked under another T2.
    attempt = before("upload")
    bundles, terms = attempt.wires("bundles"), attempt.federation.terms
    victims = attempt.sessions[ME].upload(bundles[:4], attempt.server.inbox(ME))
    attempt.alive.remove(ME)
    for stage in ("upload", "agree", "unmask"):
        getattr(attempt, stage)()
    reveal(attempt.server._evidence())
    transcript = attempt.sessions[ME].transcript
    shown = share_transcript(transcript, by_sender(bundles[:4], Bundles, terms.federation, terms.roster))
    q, mine = attempt.records[ME].open_vector(), self_key(attempt.sessions[ME].secrets.b, shown, ME)
    assert (without_pair_masks(attempt, victims, ME) - q).tolist() == expand(mine, q.size).tolist()
    answers: list[Unmask] = [message.body for message in attempt.server.unmasks.values()]
    assert not [share for answer in answers for share in answer.shares if share.peer == ME and share.kind == "b"]


def test_a_dropped_silos_inbox_opened_by_the_server_gives_no_shares_of_the_living() -> None:
    dropped = "silo-002"
    attempt = before("result", drop={"upload": {dropped}})
    reveal(attempt.server._evidence())
    keys = attempt.sessions[dropped].secrets.keys  # all of which follows from the seed that was given away
    session = attempt.sessions[dropped]
    for peer, (shares, salt) in attempt.server.inbox(dropped).items():
        with_seed = keys.salt_seal
        assert with_seed.open(salt, "fedclip/v1/salt-seal", session.transcript, peer, dropped)
        for label in ("fedclip/v1/share-seal", "fedclip/v1/salt-seal"):
            assert stop(with_seed.open, shares, label, session.transcript, peer, dropped) == "seal"


def test_a_lying_server_without_floors_gets_no_further_than_the_silos_let_it() -> None:
    # Two silos drop out of five; the server would go on with three.
    attempt = under_a_lying_server(Federation(5), drop={"upload": {"silo-001", "silo-002"}})
    attempt.join()
    attempt.share()
    attempt.upload()
    for name in (ME, "silo-003", COLLUDER):
        assert stop(attempt.sessions[name].agree, attempt.wires("uploads")) == "floor"
