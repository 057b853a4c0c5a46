from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import pytest

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import PrivacyPlan
from fedclip_secure.config.silo import Policy, SiloConfig, read_silo
from fedclip_secure.errors import DataError, PolicyError, TrustError
from fedclip_secure.pki.identity import Identity
from fedclip_secure.pki.keys import SigningKey
from fedclip_secure.pki.roster import Roster
from fedclip_secure.silo.accepted import (
    Accepted,
    check_own_key,
    check_same,
    load_accepted,
    save_accepted,
    text_features_path,
)
from fedclip_secure.silo.policy import check_policy
from tests.config.test_lock import contract
from tests.config.test_plan import plan_with
from tests.fakes import Federation

# Policy


def _policy(silo: str = "silo-000", **settings: object) -> None:
    check_policy(check(settings, Policy, "policy"), contract(), Federation(5).terms, silo)


def test_policy_lets_a_plan_pass_that_keeps_it() -> None:
    _policy()
    _policy(min_silos=4, methods=["fedclip", "linear_probe"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_silos": 5}, "a round may average 4 silos, policy.min_silos is 5"),
        ({"require_privacy": True, "max_epsilon": 8.0}, "no differential privacy, policy.require_privacy is true"),
        ({"methods": ["linear_probe"]}, "the plan's method is fedclip"),
        ({"methods": []}, "the plan's method is fedclip"),
        ({"silo": "stranger"}, "the roster does not hold stranger"),
    ],
)
def test_policy_stops_on_purpose_with_code_3(settings: dict[str, object], said: str) -> None:
    with pytest.raises(PolicyError, match=said) as caught:
        _policy(**settings)  # type: ignore[arg-type]
    assert caught.value.exit_code == 3


def test_policy_lists_all_that_it_forbids() -> None:
    with pytest.raises(PolicyError) as caught:
        _policy("stranger", min_silos=5, require_privacy=True, max_epsilon=8.0, methods=[])
    assert str(caught.value).count("\n  ") == 4


# Privacy

PRIVACY = {
    "unit": "record", "sample_rate": 0.05, "steps_per_round": 10, "max_grad_norm": 1.0, "update_divisor": 32.0,
    "delta": 1e-5, "max_retrains": 1,
}  # fmt: skip


def _private(noise: float | None, policy: dict[str, object], **privacy: object) -> str:
    """What a silo says to a private plan whose lock has this noise; nothing where it takes part."""
    plan = contract().plan.model_copy(update={"privacy": check({**PRIVACY, **privacy}, PrivacyPlan, "plan")})
    lock = contract().lock.model_copy(update={"noise_multiplier": noise})
    try:
        check_policy(check(policy, Policy, "policy"), Contract(plan, lock), Federation(5).terms, "silo-000")
    except PolicyError as error:
        return str(error)
    return ""


CAPPED: dict[str, object] = {"require_privacy": True, "max_epsilon": 8.0}


def test_a_plan_with_privacy_passes_where_its_lock_keeps_to_it() -> None:
    assert _private(9.0, CAPPED, noise_multiplier=9.0) == ""
    assert _private(50.0, CAPPED, target_epsilon=4.0) == ""


def test_a_plan_that_a_fresh_unit_could_not_pay_is_refused_with_what_would_fit() -> None:
    said = _private(0.6, CAPPED, noise_multiplier=0.6)
    assert re.search(r"policy.max_epsilon is 8 .* [0-9]+ such rounds would fit, or all with noise_multiplier", said)
    assert _private(0.6, {}, noise_multiplier=0.6) == ""


def test_noise_of_the_lock_is_not_taken_on_the_coordinators_word() -> None:
    assert "the lock no noise_multiplier" in _private(None, CAPPED, noise_multiplier=1.0)
    assert "the lock's noise_multiplier is 0.5, the plan's 1" in _private(0.5, CAPPED, noise_multiplier=1.0)
    assert re.search(r"gives epsilon [0-9.]+, the plan's target is 4", _private(0.5, CAPPED, target_epsilon=4.0))


def test_a_larger_delta_than_the_silos_own_is_refused_where_it_has_a_limit() -> None:
    said = _private(1.0, CAPPED, noise_multiplier=1.0, delta=1e-4)
    assert "the plan's privacy.delta is 0.0001, policy.delta is 1e-05" in said
    assert _private(1.0, {}, noise_multiplier=1.0, delta=1e-4) == ""


# Pins


def _silo(tmp_path: Path, text: str = "") -> tuple[Path, SiloConfig]:
    path = tmp_path / "silo.yaml"
    path.write_text(f"# private\nname: silo-000\ndata: {{format: folder, path: x}}\n{text}")
    return path, read_silo(path)


def _offer(federation: Federation | None = None) -> Accepted:
    return Accepted(contract(), (federation or Federation(3)).terms.roster)


def test_what_was_accepted_is_loaded_again_and_pinned(tmp_path: Path) -> None:
    path, config = _silo(tmp_path, "policy: {min_silos: 3}  # floor\n")
    path.chmod(0o600)
    offer = _offer()
    save_accepted(path, config, offer, b"features")
    assert load_accepted(read_silo(path)) == offer
    assert path.read_text().startswith("# private\nname: silo-000\n")
    assert "policy: {min_silos: 3}  # floor\n" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert text_features_path(config).read_bytes() == b"features"
    assert Path(config.workdir).stat().st_mode & 0o777 == 0o700


def test_accepting_again_replaces_both_pins(tmp_path: Path) -> None:
    path, config = _silo(tmp_path)
    save_accepted(path, config, _offer(), None)
    newer = Accepted(contract(plan_with("training.rounds", 7)), Federation(3).terms.roster)
    save_accepted(path, read_silo(path), newer, None)
    assert load_accepted(read_silo(path)) == newer
    assert path.read_text().count("plan: sha256:") == 1


def test_silo_that_accepted_nothing_is_told_to(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="pins no plan and roster yet; run `fedclip-silo accept`"):
        load_accepted(_silo(tmp_path)[1])


def test_documents_that_are_not_the_pinned_ones_are_refused(tmp_path: Path) -> None:
    path, config = _silo(tmp_path)
    save_accepted(path, config, _offer(), None)
    for name, other in (("contract.cbor", contract(plan_with("training.rounds", 7)).encode()),):
        Path(config.workdir, name).write_bytes(other)
    with pytest.raises(TrustError, match=r"(?s)holds another plan or roster than silo.yaml pins.*`fedclip-silo"):
        load_accepted(read_silo(path))


@pytest.mark.parametrize("name", ["contract.cbor", "roster.cbor"])
@pytest.mark.parametrize("garbage", [b"", b"garbage", b"\xff" * 99, b"\x80", b"\x82\xa0\xa0"])
def test_damaged_document_is_named_with_the_remedy(tmp_path: Path, name: str, garbage: bytes) -> None:
    path, config = _silo(tmp_path)
    save_accepted(path, config, _offer(), None)
    Path(config.workdir, name).write_bytes(garbage)
    with pytest.raises(TrustError, match=rf"(?s){name}.*run `fedclip-silo accept`"):
        load_accepted(read_silo(path))


def test_missing_document_is_named_with_the_remedy(tmp_path: Path) -> None:
    path, config = _silo(tmp_path)
    save_accepted(path, config, _offer(), None)
    Path(config.workdir, "roster.cbor").unlink()
    with pytest.raises(DataError, match=r"roster\.cbor': cannot be read .*run `fedclip-silo accept`"):
        load_accepted(read_silo(path))


def test_workdir_that_cannot_be_made_is_named_and_nothing_is_pinned(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path, config = _silo(tmp_path, "workdir: file/work\n")
    before = path.read_text()
    with pytest.raises(DataError, match=r"file/work': cannot be made .*`workdir` in silo.yaml"):
        save_accepted(path, config, _offer(), None)
    assert path.read_text() == before


def test_server_with_another_plan_is_refused_with_both_sides() -> None:
    mine = _offer()
    theirs = Accepted(contract(plan_with("secure_aggregation.min_silos", 4)), mine.roster)
    check_same(mine, mine, "https://x")
    with pytest.raises(TrustError) as caught:
        check_same(mine, theirs, "https://x")
    text = "  secure_aggregation.min_silos\n    accepted here: 3\n    server's:      4"
    assert text in str(caught.value)


def test_server_with_another_roster_is_refused_with_both_fingerprints() -> None:
    federation = Federation(3)
    mine = _offer(federation)
    keys = dict(mine.roster.members)
    changed = Roster.of({**keys, "silo-001": Federation(3).terms.roster.members[1][1]})
    larger = Roster.of({**keys, "zz": Federation(3).terms.roster.members[2][1]})
    with pytest.raises(TrustError) as caught:
        check_same(mine, Accepted(mine.contract, changed), "https://x")
    assert mine.roster.fingerprint("silo-001") in str(caught.value)
    assert changed.fingerprint("silo-001") in str(caught.value)
    with pytest.raises(TrustError, match=r"roster: zz\n    accepted here: \(absent\)"):
        check_same(mine, Accepted(mine.contract, larger), "https://x")


class _Named:
    """As much of an identity as the check of its key needs."""

    def __init__(self, key: SigningKey, name: str, folder: Path) -> None:
        self.key, self.name, self.folder = key, name, folder


def test_roster_with_another_key_under_this_silos_name_is_refused(tmp_path: Path) -> None:
    federation = Federation(3)
    mine = cast(Identity, _Named(SigningKey(federation.keys["silo-000"]), "silo-000", tmp_path))
    check_own_key(federation.terms.roster, mine)
    with pytest.raises(TrustError, match=r"another key for silo-000 .*tell the coordinator"):
        check_own_key(Federation(3).terms.roster, mine)
