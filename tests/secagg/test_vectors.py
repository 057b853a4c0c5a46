"""One whole attempt, kept in a file: this code gives its every value, and so does a second implementation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedclip_secure import canonical
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg import keys, masks, shamir
from fedclip_secure.secagg.aggregator_session import AggregatorSession
from fedclip_secure.secagg.keys import AttemptSecrets, Peer, SeedKeys
from fedclip_secure.secagg.messages import SumProof, decode_body, vector_hash
from fedclip_secure.secagg.opening_checks import Opening, Position, check_opening
from fedclip_secure.secagg.ring import FixedPoint, VectorLayout, Words
from fedclip_secure.secagg.sealing import SealKey
from fedclip_secure.secagg.silo_session import ModelRecord, Shares, SiloSession
from fedclip_secure.secagg.terms import Terms, threshold
from tests.vectors import check_secagg_v1
from tests.vectors.check_secagg_v1 import Difference
from tests.vectors.make_secagg_v1 import DROPPED, LAYOUT, make, readable
from tests.waiting import BOUND

FOLDER = Path(__file__).resolve().parent.parent / "vectors"
FILE = FOLDER / "secagg-v1.json"
TEXT = FILE.read_text(encoding="utf-8")
V: dict[str, Any] = json.loads(TEXT)
SILOS: dict[str, dict[str, Any]] = V["silos"]
LEFT = tuple(V["U3"])


def hexed(text: str) -> bytes:
    return bytes.fromhex(text)


def words(values: list[int]) -> Words:
    return np.array(values, dtype=np.uint32)


def identity(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hexed(V["identities"][name]))


def terms() -> Terms:
    given, layout = V["parameters"], Layout(LAYOUT.entries)
    return Terms(
        federation=given["federation"],
        plan=hexed(V["plan"]["digest"]),
        roster=Roster.of({name: hexed(key) for name, key in V["roster"]["members"]}),
        threshold=given["t"],
        floor=given["floor"],
        colluding=given["c"],
        rounds=4,
        layout=layout,
        vector=VectorLayout(layout.size, counts=True),
        grid=FixedPoint(given["clip"], given["n"], given["max_weight"]),
        initial_model=hexed(V["model"]["digest"]),
        training_rounds=3,
        counted_from=1,
        public_weights=None,
        verify_sum=True,
    )


def model(values: list[float]) -> AdapterState:
    return AdapterState(LAYOUT, np.array(values, dtype=np.float32))


def opening() -> Opening:
    return check_opening(terms(), Position(), hexed(V["opening"]["server_ad"]), [])


def shares(name: str) -> Shares:
    """What a silo drew in stage 1: bundles and ciphertexts."""
    sealed = {
        peer: (hexed(sent["sealed_shares"]), hexed(sent["sealed_salt"])) for peer, sent in SILOS[name]["for"].items()
    }
    return Shares(hexed(SILOS[name]["bundles"]), sealed)


def record(name: str) -> ModelRecord:
    vector = words(SILOS[name]["q"])
    return ModelRecord(opening().ad.model, lambda: vector)


def session(name: str) -> SiloSession:
    silo, base = SILOS[name], opening().base
    secrets = AttemptSecrets(SeedKeys(base, hexed(silo["seed"])), hexed(silo["b"]), SealKey(hexed(silo["share_seal"])))
    return SiloSession(terms(), name, identity(name).sign, opening(), record(name), secrets=secrets)


@dataclass
class Replay:
    """The real sessions over the secrets and ciphertexts of the file; what is sealed anew goes nowhere."""

    server: AggregatorSession
    sessions: dict[str, SiloSession]

    def sent(self, kind: str) -> list[bytes]:
        return [hexed(silo[kind]) for silo in SILOS.values() if kind in silo]

    def join(self) -> dict[str, bytes]:
        joined = {name: silo.join() for name, silo in self.sessions.items()}
        for name, wire in joined.items():
            self.server.receive_key_ad(name, wire)
        self.server.close()
        return joined

    def share(self) -> None:
        for name, silo in self.sessions.items():
            drawn = silo.share(self.sent("key_ad"), shares(name))
            self.server.receive_bundles(name, drawn.bundles, drawn.ciphertexts)
        self.server.close()

    def upload(self) -> dict[str, tuple[bytes, Words]]:
        uploads = {}
        for name in LEFT:
            upload = self.sessions[name].upload(self.sent("bundles"), self.server.inbox(name))
            self.server.receive_upload(name, upload.header, vector_hash(upload.words))
            uploads[name] = (upload.header, upload.words)
        self.server.close()
        return uploads

    def agree(self) -> dict[str, bytes]:
        agreed = {name: self.sessions[name].agree(self.sent("upload")) for name in LEFT}
        for name, wire in agreed.items():
            self.server.receive_agree(name, wire)
        self.server.close()
        return agreed

    def unmask(self) -> dict[str, bytes]:
        opened = {name: self.server.open_unmask(name, self.sessions[name].unmask(self.sent("agree"))) for name in LEFT}
        for name, wire in opened.items():
            self.server.receive_unmask(name, wire)
        self.server.close()
        return opened


STAGES = ("join", "share", "upload", "agree", "unmask", "result")


def replay(until: str) -> Replay:
    """Everything before stage `until`."""
    server = AggregatorSession(terms(), opening(), SealKey(hexed(V["opening"]["seal_private"])))
    replayed = Replay(server, {name: session(name) for name in SILOS})
    for stage in STAGES[: STAGES.index(until)]:
        getattr(replayed, stage)()
    return replayed


def test_the_file_is_small_and_readable() -> None:
    assert len(TEXT) < 300_000
    assert readable(V) + "\n" == TEXT


def test_four_silos_share_and_one_drops_out_before_it_uploads() -> None:
    assert (V["parameters"]["n"], sum(np.prod(shape) for _, shape in LAYOUT.entries)) == (4, 8)
    assert V["U1"] == V["U2"] == list(SILOS)
    assert [name for name in SILOS if name not in LEFT] == [DROPPED]


def test_roster_plan_model_and_threshold_are_those_of_the_file() -> None:
    assert terms().roster.digest.hex() == V["roster"]["digest"]
    assert [terms().roster.index(name) for name in SILOS] == [silo["x"] for silo in SILOS.values()]
    contract = canonical.decode(hexed(V["plan"]["contract"]))
    assert canonical.digest("fedclip/v1/contract", *contract).hex() == V["plan"]["digest"]
    assert model(V["model"]["values"]).digest.hex() == V["model"]["digest"]
    assert threshold(4, "malicious", V["parameters"]["c"]) == V["parameters"]["t"]
    assert terms().grid.bound == V["parameters"]["Q"]
    assert terms().vector.words == V["parameters"]["words"]


def test_the_opening_is_accepted_and_gives_its_base() -> None:
    assert opening().base.hex() == V["opening"]["base"]
    assert SealKey(hexed(V["opening"]["seal_private"])).public == opening().ad.seal_public


@pytest.mark.parametrize("name", SILOS)
def test_every_key_follows_from_seed_and_b(name: str) -> None:
    silo, secrets = SILOS[name], session(name).secrets
    private = X25519PrivateKey.from_private_bytes(hexed(silo["mask_private"]))
    assert secrets.keys.mask_public == hexed(silo["mask_public"]) == private.public_key().public_bytes_raw()
    assert secrets.keys.salt_seal.private.hex() == silo["salt_seal"]
    assert {peer: secrets.keys.salt_for(name, peer).hex() for peer in silo["pair_salts"]} == silo["pair_salts"]
    assert keys.self_commitment(secrets.keys.base, name, secrets.b).hex() == silo["self_commit"]


@pytest.mark.parametrize("name", SILOS)
def test_shares_lie_on_their_polynomial_and_any_t_give_the_secret(name: str) -> None:
    silo, t = SILOS[name], V["parameters"]["t"]
    for kind in ("seed", "b"):
        given = {SILOS[peer]["x"]: hexed(sent[f"share_{kind}"]) for peer, sent in silo["for"].items()}
        assert len(silo[f"{kind}_coefficients"]) == t - 1
        assert {x: polynomial(silo, kind, x) for x in given} == given
        assert shamir.combine(given).hex() == silo[kind]


def polynomial(silo: dict[str, Any], kind: str, x: int) -> bytes:
    """By Horner's rule, from the highest degree down."""
    value = np.zeros(32, dtype=np.uint8)
    for coefficient in [*reversed(silo[f"{kind}_coefficients"]), silo[kind]]:
        value = shamir.multiply(value, np.full(32, x, dtype=np.uint8)) ^ np.frombuffer(hexed(coefficient), np.uint8)
    return value.tobytes()


@pytest.mark.parametrize("name", SILOS)
def test_what_was_sealed_to_each_peer_opens_and_has_its_commitment(name: str) -> None:
    transcript = hexed(V["T"])
    for peer, sent in SILOS[name]["for"].items():
        shared = session(peer).secrets.share_seal.open(
            hexed(sent["sealed_shares"]), *keys.share_info(transcript, name, peer)
        )
        salt_seal = session(peer).secrets.keys.salt_seal
        salt = salt_seal.open(hexed(sent["sealed_salt"]), *keys.salt_info(transcript, name, peer))
        assert (shared.hex(), salt.hex()) == (sent["share_seed"] + sent["share_b"], SILOS[name]["pair_salts"][peer])
        for kind, share in (("seed", shared[:32]), ("b", shared[32:])):
            commitment = keys.share_commitment(transcript, name, peer, kind, share)
            assert commitment.hex() == sent[f"share_{kind}_commitment"]


@pytest.mark.parametrize("name", LEFT)
def test_keys_masks_and_commitments_are_those_of_the_file(name: str) -> None:
    silo, seed_keys, t2 = SILOS[name], session(name).secrets.keys, hexed(V["T2"])
    for peer, key in silo["pair_keys"].items():
        other = Peer(peer, hexed(SILOS[peer]["mask_public"]), hexed(SILOS[peer]["pair_salts"][name]))
        assert seed_keys.pair_key(t2, name, other).hex() == key
        assert keys.pair_commitment(t2, name, peer, hexed(key)).hex() == silo["pair_commitments"][peer]
        assert stream(key) == silo["pair_streams"][peer]
    assert keys.self_key(hexed(silo["b"]), t2, name).hex() == silo["self_key"]
    assert stream(silo["self_key"]) == silo["self_stream"]
    commitments = [hexed(commitment) for commitment in silo["pair_commitments"].values()]
    assert keys.pairs_commitment(t2, name, commitments).hex() == silo["pairs_commitment"]


def stream(key: str) -> str:
    return masks.expand(hexed(key), V["parameters"]["words"]).astype("<u4").tobytes().hex()


@pytest.mark.parametrize("name", SILOS)
def test_the_update_rounds_to_the_integers_of_the_file(name: str) -> None:
    silo, grid = SILOS[name], terms().grid
    update = np.array(silo["update"], dtype=np.float32).astype(np.float64)
    rounded = grid._round(update, silo["weight"], words(silo["rounding"])).astype(np.int32).view(np.uint32)
    assert terms().vector.pack(rounded, silo["weight"], silo["correct"], silo["total"]).tolist() == silo["q"]


def test_every_message_is_byte_for_byte_that_of_the_file() -> None:
    again = replay("join")
    assert {name: wire.hex() for name, wire in again.join().items()} == values_of("key_ad")
    again.share()
    assert {silo.transcript.hex() for silo in again.sessions.values()} == {V["T"]}
    assert again.server.transcript2.hex() == V["T2"]
    uploads = again.upload()
    assert {name: header.hex() for name, (header, _) in uploads.items()} == values_of("upload_header")
    assert {name: masked.tolist() for name, (_, masked) in uploads.items()} == values_of("y")
    assert {name: vector_hash(masked).hex() for name, (_, masked) in uploads.items()} == values_of("y_hash")
    assert {name: wire.hex() for name, wire in again.agree().items()} == values_of("agree")
    assert {message.body.survivors.hex() for message in again.server.agrees.values()} == {V["H_U3"]}
    assert {name: wire.hex() for name, wire in again.unmask().items()} == values_of("unmask")


def values_of(kind: str) -> dict[str, Any]:
    return {name: SILOS[name][kind] for name in SILOS if kind in SILOS[name]}


def test_the_aggregator_opens_the_sealed_uploads_and_unmask_answers_of_the_file() -> None:
    server = replay("upload").server
    for name in LEFT:
        opener = server.open_upload(name)
        body = b"".join(opener.feed(hexed(SILOS[name]["sealed_upload"])))
        opener.finish()
        assert opener.header == hexed(SILOS[name]["upload_header"])
        assert np.frombuffer(body, dtype="<u4").tolist() == SILOS[name]["y"]
    server = replay("unmask").server
    for name in LEFT:
        assert server.open_unmask(name, hexed(SILOS[name]["sealed_unmask"])).hex() == SILOS[name]["unmask"]


def test_sum_proof_model_and_results_are_those_of_the_file() -> None:
    again, start, after = replay("result"), model(V["model"]["values"]), V["outcome"]
    total = again.server.unmask_sum(words(SILOS[name]["y"]) for name in LEFT)
    outcome = again.server.compute_result(total, start)
    assert total.tolist() == V["unmasked"]["sum"]
    assert vector_hash(total).hex() == V["unmasked"]["sum_hash"]
    assert again.server.sum_proof().encode().hex() == V["unmasked"]["sum_proof"]
    assert (outcome.weight, outcome.correct, outcome.total) == (after["weight"], after["correct"], after["total"])
    assert outcome.model.vector.tolist() == after["values"]
    assert outcome.model.digest.hex() == after["digest"]
    assert {name: again.sessions[name].result(total, start)[0].hex() for name in LEFT} == values_of("result")


def test_the_sum_proof_of_the_file_convinces_a_silo() -> None:
    proof = decode_body(SumProof, hexed(V["unmasked"]["sum_proof"]))
    audit = replay("result").sessions[LEFT[0]].check_sum(proof)
    for name in LEFT:
        audit.add(name, words(SILOS[name]["y"]))
    assert audit.total().tolist() == V["unmasked"]["sum"]


def run_check(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(FOLDER / "check_secagg_v1.py"), str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=BOUND, check=False)


def test_a_second_implementation_derives_every_value() -> None:
    checked = run_check(FILE)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert re.search(r"\n *\d{3} values in all follow from what is given\n$", checked.stdout)


def test_the_second_implementation_imports_nothing_of_the_first() -> None:
    source = (FOLDER / "check_secagg_v1.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)) - set(sys.stdlib_module_names)
    assert imported == {"cbor2", "cryptography"}


def test_a_changed_value_is_named(tmp_path: Path) -> None:
    changed = json.loads(TEXT)
    changed["silos"]["zug"]["pair_keys"]["bn"] = "00" * 32
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    checked = run_check(tmp_path / "changed.json")
    assert checked.returncode == 1
    assert checked.stderr.startswith(f"{tmp_path / 'changed.json'}: silos/zug/pair_keys/bn: is 0000")


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to every number and text but the explanation's."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    elif path[0] != "about":
        yield path


def kinds() -> dict[str, tuple[str | int, ...]]:
    """One leaf of each kind: which silo, peer or place in a list makes no other kind."""
    return {
        "/".join("*" if part in V["identities"] or isinstance(part, int) else str(part) for part in path): path
        for path in leaves(V)
    }


# Given, so a change shows only in what follows from it.
GIVEN = {
    "identities/*": "roster/members",
    "plan/contract": "plan/digest",
    "model/values/*": "model/digest",
    "opening/seal_private": "opening/server_ad",
    "opening/nonce": "opening/server_ad",
    "opening/round": "opening/server_ad",
    "opening/attempt": "opening/server_ad",
    "silos/*/seed": "silos/zug/mask_private",
    "silos/*/b": "silos/zug/self_commit",
    "silos/*/share_seal": "silos/zug/key_ad",
    "silos/*/seed_coefficients/*": "silos/zug/for/aachen-west/share_seed",
    "silos/*/b_coefficients/*": "silos/zug/for/aachen-west/share_b",
    "U3/*": "U3",
    "silos/*/update/*": "silos/zug/q",
    "silos/*/weight": "silos/zug/q",
    "silos/*/correct": "silos/zug/q",
    "silos/*/total": "silos/zug/q",
    "silos/*/rounding/*": "silos/zug/q",
}


def altered(value: Any, kind: str) -> Any:
    if kind.endswith("rounding/*"):
        return 0 if value > 2**31 else 2**32 - 1
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1] != "0" else "1")
    return -value if isinstance(value, float) else value + 1


@pytest.mark.parametrize("kind", kinds())
def test_no_kind_of_value_stands_unchecked_in_the_file(kind: str) -> None:
    *way, last = kinds()[kind]
    changed = json.loads(TEXT)
    place = changed
    for part in way:
        place = place[part]
    place[last] = altered(place[last], kind)
    with pytest.raises(Difference) as found:
        check_secagg_v1.check(changed)
    expected = GIVEN.get(kind, "/".join(str(part) for part in (*way, last)))
    assert f"{found.value.path}/".startswith(f"{expected}/")


def test_a_value_that_nothing_accounts_for_is_refused() -> None:
    changed = json.loads(TEXT)
    changed["silos"]["zug"]["surplus"] = 1
    with pytest.raises(Difference, match="silos/zug/surplus: is a value that nothing here accounts for"):
        check_secagg_v1.check(changed)


@pytest.mark.parametrize("label", ["one", "two", "three"])
def test_both_implementations_agree_on_secrets_that_neither_has_seen(label: str) -> None:
    values = json.loads(json.dumps(make(label)))
    assert values["identities"] != V["identities"]
    assert check_secagg_v1.check(values)[:-1] == check_secagg_v1.check(V)[:-1]
