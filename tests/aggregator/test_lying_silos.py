"""What a silo does that breaks the rules is found and noted with its name, and the others finish, or the run halts.

Nothing that an honest silo has computed is lost: it is in the model, or the silo takes part in the next round.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclip_secure.aggregator.home import give_up
from fedclip_secure.errors import ProtocolError, TransportError, TrustError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.keys import pairs_commitment
from fedclip_secure.secagg.messages import KeyAd, Result, UploadHeader, decode_body, open_message
from fedclip_secure.secagg.next_model import Outcome
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.silo_session import SiloSession
from fedclip_secure.silo.run.runner import Runner
from tests.aggregator.liars import LIAR, NO_COUNTS, averaged, lying, others, run, sharing
from tests.aggregator.site import NAMES, Before, Gate, Site, VanishedError, silos_of, vanishing
from tests.secagg.lies import Lie, Sent
from tests.waiting import until

# What it seals to its peers


def garbage_for(*peers: str) -> Lie:
    """What does not open as shares."""
    return lambda peer, sent: Sent(sent.seed, sent.b, sent.salt, os.urandom(64)) if peer in peers else sent


def wrong_salt_for(*peers: str) -> Lie:
    """A salt that opens, and gives another key than the liar masks with."""
    return lambda peer, sent: Sent(sent.seed, sent.b, os.urandom(32), sent.sealed) if peer in peers else sent


def short_salt(peer: str, sent: Sent) -> Sent:
    return Sent(sent.seed, sent.b, sent.salt[:31], sent.sealed)


def wrong_seed(peer: str, sent: Sent) -> Sent:
    """Shares that are as committed, and combine to nothing."""
    seed = os.urandom(32)
    return Sent(seed, sent.b, sent.salt, seed + sent.b)


def wrong_b(peer: str, sent: Sent) -> Sent:
    b = os.urandom(32)
    return Sent(sent.seed, b, sent.salt, sent.seed + b)


def at_odds(*pairs: str) -> str:
    return f"{', '.join(pairs)} masked with different keys: one of the two shared garbage"


def last(site: Site) -> Before:
    """Uploads when the others have."""

    async def before(attempt: int, stage: str) -> None:
        if stage == "uploads":
            await until(lambda: site.kept("uploads") == site.kept("bundles") - 1)

    return before


def test_garbage_shares_and_then_silence_are_complained_of_and_the_accuser_is_back_in_the_next_round(
    tmp_path: Path,
) -> None:
    site = Site.frozen(tmp_path, 7, deadlines={"join": 2})
    run(site, sharing(garbage_for("lab-b")), vanishing("uploads"))
    assert averaged(site) == [["lab-a", "lab-c", "lab-e", "lab-f", "lab-g"], others(site)]
    assert site.reasons(None) == [f"lab-b complains that what {LIAR} sent it does not open (bundle)"]


def test_a_salt_of_the_wrong_length_is_complained_of(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, 7, splits=NO_COUNTS)
    run(site, sharing(short_salt))
    assert LIAR not in averaged(site)[0]
    assert f"complains that what {LIAR} sent it does not open (bundle)" in site.reasons(None)[0]


def test_a_wrong_salt_is_found_by_the_commitments_before_anybody_agrees_and_both_are_out(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, 7, deadlines={"join": 2})
    run(site, sharing(wrong_salt_for("lab-b")), vanishing("agrees"))
    assert averaged(site) == [["lab-a", "lab-c", "lab-e", "lab-f", "lab-g"], list(NAMES[:7])]
    assert site.reasons(None) in ([at_odds(f"lab-b and {LIAR}")], [at_odds(f"{LIAR} and lab-b")])


def test_wrong_salts_for_more_than_can_lie_together_put_the_liar_out_alone(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, splits=NO_COUNTS)
    run(site, sharing(wrong_salt_for(*NAMES)), last(site))
    assert averaged(site) == [others(site)]
    assert len(site.reasons(None)) == 1
    assert all(f"{name} and {LIAR}" in site.reasons(None)[0] for name in others(site))


def test_a_wrong_salt_puts_out_either_side_where_both_are_too_many_and_an_honest_one_is_back_once_the_liar_lies_again(
    tmp_path: Path,
) -> None:
    site = Site.frozen(tmp_path, splits=NO_COUNTS)
    run(site, sharing(wrong_salt_for("lab-a"), wrong_salt_for("lab-b")), last(site))
    assert averaged(site) == [others(site)]
    lies = [at_odds(f"lab-a and {LIAR}"), at_odds(f"lab-b and {LIAR}")]
    assert site.reasons(None) in (lies[:1], lies)  # chance decided whether the liar could lie twice


@pytest.mark.parametrize("lie", [wrong_salt_for(*NAMES), wrong_seed], ids=["salt", "seed"])
def test_the_sum_is_exact_without_a_silo_that_shared_garbage_and_dropped_out_before_its_upload(
    tmp_path: Path, lie: Lie
) -> None:
    site = Site.frozen(tmp_path, splits=NO_COUNTS, deadlines={"upload": 2})
    assert isinstance(run(site, sharing(lie), vanishing("uploads")), VanishedError)
    assert averaged(site) == [others(site)]
    assert site.status().attempt == 1
    assert site.reasons(LIAR) == ["no answer within 2 s"]


def test_garbage_shares_of_b_and_then_silence_are_noted_by_name_and_waited_out(tmp_path: Path) -> None:
    site, gate = Site.frozen(tmp_path, splits=NO_COUNTS, deadlines={"unmask": 1}), Gate("unmasks")

    async def among() -> None:
        async with site.serving(), silos_of(site) as silos:
            silos.start(LIAR, before=gate, runner=sharing(wrong_b))
            silos.start(*others(site))
            await until(lambda: f"{LIAR} shared another b than it committed to" in site.reasons(LIAR))
            assert site.status().stage == "unmask"
            gate.opened.set()
            await silos.done()

    asyncio.run(among())
    assert averaged(site) == [list(NAMES[:4])]
    assert site.status().attempt == 1


class Abandoning(Runner):
    """A silo whose person has given round 1 up."""

    async def run(self, abandon: int | None = None) -> None:
        await super().run(1)


def test_where_such_a_silo_is_gone_for_good_people_give_the_round_up_and_the_others_go_on_without_it(
    tmp_path: Path,
) -> None:
    site = Site.frozen(tmp_path, splits=NO_COUNTS, deadlines={"join": 1, "unmask": 1})

    async def among() -> None:
        async with site.serving(), silos_of(site) as silos:
            silos.start(LIAR, before=vanishing("unmasks"), runner=sharing(wrong_b))
            silos.start(*others(site))
            await until(lambda: f"{LIAR} shared another b than it committed to" in site.reasons(LIAR))
            assert give_up(site.home) == "round 1, attempt 1"
            await until(lambda: "blocked" in [event["kind"] for event in site.status().events if not event["silo"]])
            for name in others(site):
                assert any("sitting out until the model has moved on" in text for text in silos.heard[name])
            await silos.stop()
            silos.start(*others(site), runner=Abandoning)
            await silos.done(*others(site))

    asyncio.run(among())
    assert averaged(site) == [others(site)]


# What it says of others


class FalseAccuser(SiloSession):
    """Complains of a silo that did nothing wrong."""

    def upload(self, *answer: Any) -> Any:
        super().upload(*answer)
        raise ProtocolError("bundle", "made up", silo="lab-a")


@pytest.mark.parametrize(("silos", "left"), [(4, ["lab-a", "lab-b", "lab-c"]), (7, ["lab-b", "lab-c", *NAMES[4:7]])])
def test_a_false_complaint_leaves_out_both_or_where_that_is_too_few_the_accuser_and_for_this_round_alone(
    tmp_path: Path, silos: int, left: list[str]
) -> None:
    site = Site.frozen(tmp_path, silos)
    run(site, lying(FalseAccuser))
    assert averaged(site) == [left, list(NAMES[:silos])]
    assert site.reasons(None) == [f"{LIAR} complains that what lab-a sent it does not open (bundle)"]


# Its keys


def with_keys(**change: Callable[[KeyAd], bytes]) -> type[SiloSession]:
    """A silo that announces other keys than it should."""

    class OddKeys(SiloSession):
        def join(self) -> bytes:
            super().join()
            update = {name: of(self._ad) for name, of in change.items()}
            self._ad = self._ad.model_copy(update=update)
            return self._sign_body(self._ad)

    return OddKeys


KEYS = {
    "low order": with_keys(mask_public=lambda ad: bytes(32)),
    "bit 255": with_keys(salt_seal=lambda ad: ad.salt_seal[:-1] + bytes([ad.salt_seal[-1] | 0x80])),
    "in two roles": with_keys(share_seal=lambda ad: ad.share_seal[:-32] + ad.mask_public),
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_silo_whose_keys_nobody_could_use_safely_is_refused_and_the_others_finish_without_it(
    tmp_path: Path, kind: str
) -> None:
    site = Site.frozen(tmp_path, splits=NO_COUNTS, deadlines={"join": 2})
    ended = run(site, lying(KEYS[kind]))
    assert isinstance(ended, TransportError)
    assert (ended.status, ended.code) == (400, "key")
    assert averaged(site) == [others(site)]
    assert site.reasons(LIAR)[0].startswith("refused (key)")


# Its upload


def with_header(change: Callable[[SiloSession, UploadHeader], UploadHeader]) -> type[SiloSession]:
    """A silo that changes what travels in front of its masked vector."""

    class OddHeader(SiloSession):
        def _commit(self, words: Words) -> bytes:
            return change(self, decode_body(UploadHeader, super()._commit(words))).encode()

    return OddHeader


def resigned(session: SiloSession, pairs: list[bytes]) -> UploadHeader:
    """A header whose commitments are those that it signs."""
    commitment = pairs_commitment(session._transcript2, session._silo, pairs)
    session._own_upload = session._own_upload.model_copy(update={"pairs": commitment})
    return UploadHeader.model_construct(upload=session._sign_body(session._own_upload), pairs=pairs)


HEADERS: dict[str, tuple[str, Callable[[SiloSession, UploadHeader], UploadHeader]]] = {
    "other commitments than it signed": (
        "vector",
        lambda session, header: header.model_copy(update={"pairs": header.pairs[::-1]}),
    ),
    "too few": ("vector", lambda session, header: resigned(session, header.pairs[1:])),
    "too many": ("vector", lambda session, header: resigned(session, [*header.pairs, bytes(32)])),
    "more than any roster has silos": ("message", lambda session, header: resigned(session, [bytes(32)] * 255)),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_an_upload_with_odd_commitments_is_refused_and_the_others_finish_without_it(tmp_path: Path, kind: str) -> None:
    code, change = HEADERS[kind]
    site = Site.frozen(tmp_path, splits=NO_COUNTS, deadlines={"upload": 2})
    ended = run(site, lying(with_header(change)))
    assert isinstance(ended, TransportError)
    assert (ended.status, ended.code) == (400, code)
    assert averaged(site) == [others(site)]
    assert site.reasons(LIAR)[0].startswith(f"refused ({code})")
    assert site.status().attempt == 1


def test_signed_commitments_to_keys_that_nobody_has_put_the_liar_out(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, splits=NO_COUNTS)
    liar = lying(with_header(lambda session, header: resigned(session, [os.urandom(32) for _ in header.pairs])))
    run(site, liar, last(site))
    assert averaged(site) == [others(site)]
    assert all(f"{name} and {LIAR}" in site.reasons(None)[0] for name in others(site))


# Its vector


def sending(change: Callable[[Words], None]) -> type[Runner]:
    """A silo that changes its vector before it masks it."""

    class OddVector(Runner):
        def _make_vector(self, *args: Any, **options: Any) -> Words:
            words = super()._make_vector(*args, **options)
            change(words)
            return words

    return OddVector


def garbage(words: Words) -> None:
    """A weight as it should be, so that only the coordinates are wrong: that all pass by chance has 2^-50."""
    words[:-3] = np.frombuffer(os.urandom(words[:-3].nbytes), dtype=np.uint32)


def weighing(weight: int) -> Callable[[Words], None]:
    def change(words: Words) -> None:
        words[-3] = weight % 2**32

    return change


def counting(correct: int, total: int) -> Callable[[Words], None]:
    def change(words: Words) -> None:
        words[-2:] = correct % 2**32, total % 2**32

    return change


LISTED: dict[str, object] = {"weights": "public", "public_weights": {"lab-a": 8, "lab-b": 16, "lab-c": 32, LIAR: 64}}
VECTORS: dict[str, tuple[dict[str, object], Callable[[Words], None], str]] = {
    "garbage": ({}, garbage, "beyond the clip"),
    "weight zero": ({"weights": "equal"}, weighing(0), "the weights of 4 silos add up to 3"),
    "a negative weight": ({}, weighing(-60), "the weights of 4 silos add up to -4"),
    "a weight above all": ({}, weighing(4 * 1024), "the weights of 4 silos add up to 4152"),
    "a weight that wraps": ({}, weighing(2**31), "the weights of 4 silos add up to -"),
    "another weight than listed": (LISTED, weighing(65), "the weights add up to 121, the plan's to 120"),
    "more right than there are": ({}, counting(1000, 5), "validation counts add up to 1009 of 20"),
    "a negative count": ({}, counting(3, -20), "validation counts add up to 12 of -5"),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_a_vector_out_of_range_voids_the_sum_by_a_signed_word_and_halts_the_run(tmp_path: Path, kind: str) -> None:
    agreed, change, reason = VECTORS[kind]
    site = Site.frozen(tmp_path, secure_aggregation=agreed)

    async def among() -> None:
        async with site.serving(), silos_of(site) as silos:
            silos.start(LIAR, runner=sending(change))
            silos.start(*others(site))
            for name in others(site):
                with pytest.raises(TrustError, match=f"declared the sum void.*{reason}"):
                    await silos.done(name)

    asyncio.run(among())
    status = site.status()
    assert (status.state, status.finished_rounds) == ("halted", [])
    assert reason in status.reason
    assert [(event["kind"], event["stage"]) for event in status.events] == [("halted", "unmask")]


# Its answers


class WrongPairKey(SiloSession):
    def unmask(self, agrees: Sequence[bytes]) -> bytes:
        dropped = next(peer for peer in self._peers() if peer not in self._uploads)
        self._pair_keys[dropped] = os.urandom(32)
        return super().unmask(agrees)


def test_a_wrong_pair_key_with_a_drop_out_is_refused_by_name_and_the_others_unmask_the_sum(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, 7, splits=NO_COUNTS, deadlines={"upload": 2, "unmask": 2})

    async def among() -> None:
        async with site.serving(), silos_of(site) as silos:
            silos.start("lab-g", before=vanishing("uploads"))
            silos.start(LIAR, runner=lying(WrongPairKey))
            honest = [name for name in others(site) if name != "lab-g"]
            silos.start(*honest)
            await silos.done(*honest)
            with pytest.raises(TransportError, match=f"{LIAR} gave another pair key than it committed to") as refusal:
                await silos.done(LIAR)
            assert (refusal.value.status, refusal.value.code) == (400, "share")

    asyncio.run(among())
    assert averaged(site) == [list(NAMES[:6])]  # what it uploaded was right
    assert site.reasons(LIAR)[0].startswith("refused (share)")


class OtherResult(SiloSession):
    def result(self, total: Words, old: AdapterState) -> tuple[bytes, Outcome]:
        wire, outcome = super().result(total, old)
        body = open_message(wire, Result, self._terms.federation, self._terms.roster).body
        return self._sign_body(body.model_copy(update={"model": os.urandom(32)})), outcome


def test_another_result_from_the_same_sum_is_refused_and_the_others_confirm_the_round(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, splits=NO_COUNTS)

    async def first(attempt: int, stage: str) -> None:
        """The others wait with their results until the liar's has come."""
        if stage == "results":
            await until(lambda: site.reasons(LIAR) != [])

    async def among() -> None:
        async with site.serving(), silos_of(site) as silos:
            silos.start(LIAR, runner=lying(OtherResult))
            silos.start(*others(site), before=first)
            await silos.done(*others(site))
            with pytest.raises(TransportError) as refusal:
                await silos.done(LIAR)
            assert (refusal.value.status, refusal.value.code) == (400, "result")

    asyncio.run(among())
    assert averaged(site) == [list(NAMES[:4])]
    assert site.reasons(LIAR) == [f"refused (result): {LIAR} computed another result from the same sum"]
