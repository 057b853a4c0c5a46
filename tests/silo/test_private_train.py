"""`train` under a plan with privacy: real server, ledger, journal and engine; features from files."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from fedclip_secure.aggregator.home import freeze, init_home
from fedclip_secure.config.lock import write_lock
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.errors import ConfigError, DataError, PolicyError, TrustError
from fedclip_secure.files import write_atomically
from fedclip_secure.privacy.entries import Begin, Data, Reserve, Settle, chain_of
from fedclip_secure.privacy.planned import PlannedRun
from fedclip_secure.privacy.verify import verify
from fedclip_secure.silo.account import Account, note_of, open_ledger
from fedclip_secure.silo.outcome import adapter_folder
from fedclip_secure.silo.pins import Accepted, load_accepted, save_accepted
from fedclip_secure.silo.report import make_report
from fedclip_secure.silo.train import take_part
from fedclip_secure.training.inputs import load_inputs
from fedclip_secure.training.prepare import prepare
from tests.aggregator.site import NAMES, Site, free_port

SILOS, DIM, RECORDS = NAMES[:3], 8, 60
CLASSES = {"cat": "cat", "dog": "dog"}


class StoppedOnPurposeError(Exception):
    """As if a person had pressed Ctrl-C."""


def write_records(folder: Path, name: str, count: int = RECORDS) -> None:
    generator = np.random.default_rng(NAMES.index(name))
    labels = generator.integers(0, 2, count)
    features = generator.normal(size=(count, DIM)) + 3 * np.eye(2, DIM)[labels]
    ids = generator.integers(0, 256, (count, 32)).astype(np.uint8)
    save_file(
        {"features": features.astype(np.float32), "labels": labels.astype(np.int64), "ids": ids},
        folder / f"{name}.safetensors",
        {"classes": json.dumps(list(CLASSES))},
    )


@dataclass
class Labs:
    """Three labs that have accepted a private plan."""

    folder: Path
    site: Site
    accepted: Accepted
    configs: dict[str, SiloConfig] = field(default_factory=dict)
    heard: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path, cap: float | None = 100.0, **privacy: Any) -> Labs:
        folder.mkdir(exist_ok=True)
        port = free_port()
        home = init_home(folder / "home", "lung-xray", ["127.0.0.1"], port)
        plan = {
            "federation": "lung-xray",
            "server": f"https://127.0.0.1:{port}",
            "model": {"name": "external", "dim": DIM, "text_features": "prompts.safetensors"},
            "classes": CLASSES,
            "templates": ["{}"],
            "splits": {"train": 0.8, "validation": 0.0, "test": 0.2},
            "method": {"name": "fedclip"},
            "training": {"rounds": 2, "optimizer": {"name": "adam", "lr": 0.01}},
            "secure_aggregation": {"weights": "equal"},
            "privacy": {
                "unit": "record", "sample_rate": 0.3, "steps_per_round": 3, "noise_multiplier": 1.5,
                "max_grad_norm": 1.0, "update_divisor": 15.0, "delta": 1e-5, **privacy,
            },
            "deadlines": dict.fromkeys(("join", "share", "upload", "agree", "unmask"), 20),
        }  # fmt: skip
        home.plan_path.write_text(yaml.safe_dump(plan, sort_keys=False))
        text = {"text_features": np.eye(2, DIM, dtype=np.float32), "logit_scale": np.float32(10.0)}
        save_file({key: np.asarray(value) for key, value in text.items()}, home.folder / "prompts.safetensors",
                  {"classes": json.dumps(list(CLASSES))})  # fmt: skip
        prepared = prepare(home.plan(), home.folder)
        write_atomically(home.initial_path, prepared.initial_file)
        write_lock(home.lock_path, prepared.lock)
        site = Site(home, port)
        for name in SILOS:
            site.enrol(name)
        site.contract, roster, site.terms = freeze(home)
        labs = cls(folder, site, Accepted(site.contract, roster))
        for name in SILOS:
            labs.settle(name, cap)
        return labs

    def settle(self, name: str, cap: float | None) -> None:
        """silo.yaml, data, and what was accepted."""
        write_records(self.folder, name)
        path = self.folder / f"{name}.yaml"
        policy = {} if cap is None else {"require_privacy": True, "max_epsilon": cap}
        data = {"format": "embeddings", "path": str(self.folder / f"{name}.safetensors"), "ids": "record"}
        values = {
            "name": name, "data": {**data, "per_record": True}, "identity": str(self.site.identities[name].folder),
            "workdir": str(self.folder / name / "work"), "ledger": str(self.folder / name / "ledger"),
            "device": "cpu", "policy": policy,
        }  # fmt: skip
        self.configs[name] = SiloConfig.model_validate(values)
        path.write_text(yaml.safe_dump(values))
        prompts = (self.site.home.folder / "prompts.safetensors").read_bytes()
        save_accepted(path, self.configs[name], self.accepted, prompts)

    async def train(self, name: str, say: Callable[[str], None] = lambda _: None, **how: Any) -> None:
        heard = self.heard.setdefault(name, [])

        def tell(text: str) -> None:
            heard.append(text)
            say(text)

        await take_part(
            self.configs[name],
            self.site.identities[name],
            self.accepted,
            progress=lambda _: None,
            say=tell,
            waiting=lambda *_: None,
            **how,
        )

    def run(self, **how: dict[str, Any]) -> list[BaseException | None]:
        """All three, each with its own `how`; what each ended with."""

        async def main() -> list[BaseException | None]:
            async with self.site.serving(), asyncio.timeout(100):
                tasks = [self.train(name, **how.get(name.replace("-", "_"), {})) for name in SILOS]
                return await asyncio.gather(*tasks, return_exceptions=True)

        return asyncio.run(main())

    def alone(self, name: str, **how: Any) -> BaseException | None:
        """One of them, against the running server."""

        async def main() -> BaseException | None:
            async with self.site.serving(), asyncio.timeout(100):
                return (await asyncio.gather(self.train(name, **how), return_exceptions=True))[0]

        return asyncio.run(main())

    def entries(self, name: str) -> list[Any]:
        ledger = open_ledger(self.configs[name], self.site.identities[name])
        try:
            return chain_of(ledger.entries()).entries
        finally:
            ledger.close()


def kinds(entries: list[Any]) -> list[type]:
    return [type(entry) for entry in entries]


def test_a_private_run_is_charged_round_by_round_and_ends_with_a_report_that_verifies(tmp_path: Path) -> None:
    labs = Labs.create(tmp_path)
    assert labs.run() == [None] * 3
    name = SILOS[0]
    entries = labs.entries(name)
    assert kinds(entries) == [Begin, *[Reserve, Settle] * 2]
    assert [entry.round for entry in entries if isinstance(entry, Reserve)] == [1, 2]
    assert entries[0].features == "stated to be per record"
    card = json.loads((adapter_folder(Path(labs.configs[name].workdir)) / "last.json").read_text())
    assert card["model_digest"] != labs.accepted.contract.lock.initial_model
    assert card["privacy"].startswith(f"epsilon = {card['claim']['epsilon']:.4f} at delta = ")
    assert any(line.startswith(f"{name}: privacy: epsilon at most ") for line in labs.heard[name])
    data = make_report(labs.configs[name], labs.site.identities[name], load_accepted(labs_pinned(labs, name)), None)
    verdict = verify(data)
    assert verdict.passed, verdict.failures
    body = json.loads(data)["body"]
    planned = PlannedRun.of(labs.accepted.contract)
    assert planned is not None
    assert body["claim"]["epsilon"] == planned.epsilon()
    assert body["claim"]["spent"]["trained"] == [1, 2]
    assert (body["ledger"]["uploaded"], len(body["models"])) == ([1, 2], 2)


def labs_pinned(labs: Labs, name: str) -> SiloConfig:
    """As silo.yaml has it after `accept`."""
    contract, roster = labs.accepted.contract.pin, labs.accepted.roster.pin
    return labs.configs[name].model_copy(update={"plan": contract, "roster": roster})


def test_a_plan_that_does_not_fit_the_cap_stops_before_anything_leaves_and_says_what_would_fit(tmp_path: Path) -> None:
    labs = Labs.create(tmp_path, cap=0.5)
    stopped = labs.alone(SILOS[0])
    assert isinstance(stopped, PolicyError)
    assert stopped.exit_code == 3
    assert "rounds" in str(stopped)
    assert "noise_multiplier" in str(stopped)
    assert labs.entries(SILOS[0]) == []
    assert labs.site.rows("SELECT count(*) FROM messages") == [(0,)]


def test_a_silo_that_may_neither_train_again_nor_be_absent_stops_with_a_reason(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    account = Account.opened(labs.configs[name], labs.site.identities[name], labs.accepted)
    ids = unit_ids_of(labs, name)
    account.begin(ids, changed_data=False)
    with pytest.raises(StoppedOnPurposeError), account.charged(1):
        raise StoppedOnPurposeError
    account.close()
    stopped = labs.alone(name)
    assert isinstance(stopped, PolicyError)
    assert "no silo may be absent from a round of this federation" in str(stopped)


def unit_ids_of(labs: Labs, name: str) -> Any:
    config = labs_pinned(labs, name)
    prompts = Path(config.workdir) / "text_features.safetensors"
    return load_inputs(config, labs.accepted.contract, lambda _: None, prompts).splits["train"].unit_ids


def test_a_bound_of_units_that_does_not_hold_is_not_signed(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    assert labs.run() == [None] * 3
    for bound, fits in ((10, True), (RECORDS, False)):
        config = labs_pinned(labs, name).model_copy(update={"units_at_least": bound})
        if fits:
            assert json.loads(make_report(config, labs.site.identities[name], labs.accepted, None))
        else:
            with pytest.raises(ConfigError, match="units_at_least: 60 is more than this run has"):
                make_report(config, labs.site.identities[name], labs.accepted, None)


def test_a_silo_that_stops_between_rounds_goes_on_with_the_same_run_and_pays_nothing_twice(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]

    def stop(text: str) -> None:
        if "round 1 of 2: averaged" in text:
            raise StoppedOnPurposeError

    async def main() -> None:
        async with labs.site.serving(), asyncio.timeout(100):
            others = [asyncio.create_task(labs.train(other)) for other in SILOS[1:]]
            with pytest.raises(StoppedOnPurposeError):
                await labs.train(name, stop)
            await labs.train(name)
            await asyncio.gather(*others)

    asyncio.run(main())
    assert kinds(labs.entries(name)) == [Begin, *[Reserve, Settle] * 2]


def test_a_ledger_that_was_restored_from_before_an_upload_is_refused(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    ledger, backup = Path(labs.configs[name].ledger), tmp_path / "backup"

    def copy_then_stop(text: str) -> None:
        if "privacy: epsilon at most" in text:
            shutil.copytree(ledger, backup)
        if "round 1 of 2: averaged" in text:
            raise StoppedOnPurposeError

    ended = labs.run(
        lab_a={"say": copy_then_stop}, lab_b={"say": copy_then_stop_at_one}, lab_c={"say": copy_then_stop_at_one}
    )
    assert all(isinstance(end, StoppedOnPurposeError) for end in ended)
    newest = tmp_path / "newest"
    ledger.rename(newest)
    shutil.copytree(backup, ledger)
    refused = labs.alone(name)
    assert isinstance(refused, TrustError)
    assert "lacks the entry that was written last" in str(refused)
    note_of(labs.configs[name]).unlink()  # the note beside the ledger went back too
    refused = labs.alone(name)
    assert isinstance(refused, TrustError)
    assert "lacks 1 of the entries that the coordinator holds receipts for" in str(refused)


def test_a_ledger_that_is_lost_is_refused_by_the_next_federation_too(tmp_path: Path) -> None:
    first, second, name = Labs.create(tmp_path / "first"), Labs.create(tmp_path / "second"), SILOS[0]
    second.configs[name] = second.configs[name].model_copy(update={"ledger": first.configs[name].ledger})
    first.run(**{silo.replace("-", "_"): {"say": copy_then_stop_at_one} for silo in SILOS})
    shutil.rmtree(first.configs[name].ledger)
    refused = second.alone(name)
    assert isinstance(refused, TrustError)
    assert "put its newest backup there" in str(refused)
    assert not Path(first.configs[name].ledger).exists(), "nothing is begun in its place"


def copy_then_stop_at_one(text: str) -> None:
    if "round 1 of 2: averaged" in text:
        raise StoppedOnPurposeError


def test_data_that_changed_within_a_run_are_refused_until_a_person_says_so(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    ended = labs.run(**{silo.replace("-", "_"): {"say": copy_then_stop_at_one} for silo in SILOS})
    assert all(isinstance(end, StoppedOnPurposeError) for end in ended)
    write_records(labs.folder, name, RECORDS + 20)
    refused = labs.alone(name)
    assert isinstance(refused, DataError)
    assert "--changed-data" in str(refused)
    assert Data not in kinds(labs.entries(name))
    assert labs.run(lab_a={"changed_data": True}) == [None] * 3
    assert kinds(labs.entries(name)) == [Begin, Reserve, Settle, Data, Reserve, Settle]


def test_two_identities_of_one_organisation_cannot_write_into_the_ledger_at_once(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    holder = open_ledger(labs.configs[name], labs.site.identities[name])
    try:
        refused = labs.alone(name)
    finally:
        holder.close()
    assert isinstance(refused, DataError)
    assert "ledger" in str(refused)


def test_features_without_the_silos_word_are_refused(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    config = labs.configs[name]
    labs.configs[name] = config.model_copy(update={"data": config.data.model_copy(update={"per_record": False})})
    refused = labs.alone(name)
    assert refused is not None
    assert "data.per_record" in str(refused)
    assert labs.entries(name) == []


def test_a_report_of_a_plan_without_privacy_says_what_is_not_protected(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)
    name = NAMES[0]
    config = SiloConfig.model_validate(
        {"name": name, "data": {"format": "folder", "path": "x"}, "workdir": str(tmp_path / "work")}
    )
    roster = site.terms.roster
    data = make_report(config, site.identities[name], Accepted(site.contract, roster), None)
    body = json.loads(data)["body"]
    assert verify(data).passed
    assert (body["claim"], body["ledger"], body["mechanism"]) == (None, None, None)
    assert {item["id"]: item["status"] for item in body["scope"]}["update-plain"] == "unprotected"
    assert not (tmp_path / "ledger").exists(), "and no ledger is begun for it"
