"""`train` under a plan with privacy: real server, ledger, journal and engine; features from files."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from fedclip_secure.aggregator.home import freeze, init_home
from fedclip_secure.config.lock import write_lock
from fedclip_secure.config.silo import FolderData, ManifestData, Patients, SiloConfig
from fedclip_secure.errors import ConfigError, DataError, PolicyError, TrustError
from fedclip_secure.files import write_atomically
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.ledger.entries import Begin, Clock, Data, End, Reserve, Settle, chain_of
from fedclip_secure.privacy.ledger.ledger import Ledger
from fedclip_secure.privacy.report.software import code_sha256
from fedclip_secure.privacy.verification.verify import verify
from fedclip_secure.silo.accepted import Accepted, load_accepted, save_accepted
from fedclip_secure.silo.receipts import read_receipts
from fedclip_secure.silo.report import make_report
from fedclip_secure.silo.run.final_models import adapter_folder
from fedclip_secure.silo.run.privacy_account import (
    Account,
    about_ledger,
    about_place,
    cap_of,
    end_runs,
    existing_ledger,
    mend_clock,
    note_of,
    open_ledger,
    run_terms,
)
from fedclip_secure.silo.run.train import take_part
from fedclip_secure.training.inputs import load_inputs
from fedclip_secure.training.prepare import prepare
from tests.aggregator.site import NAMES, Site, free_port
from tests.waiting import BOUND

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
            "deadlines": dict.fromkeys(("join", "share", "upload", "agree", "unmask"), int(BOUND)),
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
            async with self.site.serving(), asyncio.timeout(BOUND):
                tasks = [self.train(name, **how.get(name.replace("-", "_"), {})) for name in SILOS]
                return await asyncio.gather(*tasks, return_exceptions=True)

        return asyncio.run(main())

    def alone(self, name: str, **how: Any) -> BaseException | None:
        """One of them, against the running server."""

        async def main() -> BaseException | None:
            async with self.site.serving(), asyncio.timeout(BOUND):
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
    assert "privacy.max_retrains are used up" in str(stopped)


def test_train_says_of_a_run_that_was_ended_that_it_was_and_what_to_do(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    begun(labs, name, 1)
    config, identity = labs.configs[name], labs.site.identities[name]
    assert not about_ledger(config, identity, labs.accepted)[1]
    assert end_runs(config, identity, "lung-xray") == 1
    assert about_ledger(config, identity, labs.accepted)[1], "which `accept` says in place of the next steps"
    stopped = labs.alone(name)
    assert isinstance(stopped, PolicyError)
    assert (
        "this silo's run was ended with `fedclip-silo budget --end`, and nothing more is paid for in it; no silo may "
        "be absent from a round of this federation, so the run cannot go on: tell the coordinator, who needs a new "
        "federation" in str(stopped)
    )
    assert "retrains" not in str(stopped)
    told = "; this silo's run was ended, by `fedclip-silo budget --end` or as the federation came to its end, and "
    assert any(f"{told}nothing more is paid for in it; to train again this" in line for line in labs.heard[name])


def moved(labs: Labs, name: str, folder: Path) -> None:
    """Let silo.yaml name another ledger."""
    labs.configs[name] = labs.configs[name].model_copy(update={"ledger": str(folder)})


def not_known_to(labs: Labs, name: str, said: str) -> None:
    """`accept` and `budget` refuse the ledger that silo.yaml names."""
    config, identity = labs_pinned(labs, name), labs.site.identities[name]
    for ask in (lambda: about_ledger(config, identity, labs.accepted), lambda: existing_ledger(config, identity)):
        with pytest.raises(TrustError) as refused:
            ask()
        assert str(refused.value) == said


def test_another_ledger_than_the_run_was_begun_with_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    ended = labs.run(**{silo.replace("-", "_"): {"say": copy_then_stop_at_one} for silo in SILOS})
    assert all(isinstance(end, StoppedOnPurposeError) for end in ended)
    old, new = Path(labs.configs[name].ledger), tmp_path / "elsewhere" / "ledger"
    moved(labs, name, new)
    said = (
        f"silo.yaml: `ledger` names {new}, and the run of federation lung-xray was begun with the ledger {old}, which "
        f"knows what it spent; set `ledger` back to {old}, or move that whole folder, and the file beside it that ends "
        "in .head, to where silo.yaml says"
    )
    refused = labs.alone(name)
    assert isinstance(refused, TrustError)
    assert str(refused) == said
    with pytest.raises(TrustError, match="was begun with the ledger"):
        make_report(labs_pinned(labs, name), labs.site.identities[name], labs.accepted, None)
    not_known_to(labs, name, said)
    assert not new.parent.exists()
    # The same where another federation has its ledger.
    moved(labs, name, Path(labs.configs[SILOS[1]].ledger))
    assert str(labs.alone(name)) == said.replace(str(new), str(labs.configs[name].ledger))
    # As version 0.1 left it: no note, but receipts.
    (Path(labs.configs[name].workdir) / "ledger.json").unlink()
    moved(labs, name, new)
    refused = labs.alone(name)
    assert isinstance(refused, TrustError)
    assert "was begun with another ledger, which knows what it spent; set `ledger` back, or move" in str(refused)
    not_known_to(labs, name, str(refused))
    assert not new.parent.exists()


def test_ledger_that_was_moved_with_its_note_is_gone_on_with(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    begun(labs, name, 1)
    old, new = Path(labs.configs[name].ledger), tmp_path / "elsewhere" / "ledger"
    new.parent.mkdir()
    old.rename(new)
    note_of(labs.configs[name]).rename(f"{new}.head")
    moved(labs, name, new)
    begun(labs, name, 2)
    assert kinds(labs.entries(name)) == [Begin, *[Reserve, Settle] * 2]
    assert json.loads((Path(labs.configs[name].workdir) / "ledger.json").read_text())["ledger"] == str(new)


def test_ledger_that_is_gone_with_its_note_is_missed_by_the_run_that_was_begun_with_it(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    begun(labs, name, 1)
    ledger = Path(labs.configs[name].ledger)
    shutil.rmtree(ledger)
    note_of(labs.configs[name]).unlink()
    with pytest.raises(
        TrustError, match=rf"^'{ledger}': is gone, and the run of federation lung-xray was begun with it; put"
    ):
        begun(labs, name, 2)
    assert not ledger.exists()
    with closing(open_ledger(labs.configs[name], labs.site.identities[name])):  # somebody begins it anew
        pass
    with pytest.raises(
        TrustError, match=r"lacks the run of federation lung-xray, which was begun with it, .*restore the"
    ):
        begun(labs, name, 2)


def test_note_of_the_ledger_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    begun(labs, name)
    note = Path(labs.configs[name].workdir) / "ledger.json"
    for text in ("garbage", "[]", "{}", "\u1234"):
        note.write_text(text)
        with pytest.raises(
            DataError, match=rf"^'{note}': which ledger the run was begun with cannot be read; delete it"
        ):
            begun(labs, name)


def test_run_that_the_limit_was_lowered_below_is_still_reported(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    assert labs.run() == [None] * 3
    policy = labs.configs[name].policy.model_copy(update={"max_epsilon": 0.8})
    labs.configs[name] = labs.configs[name].model_copy(update={"policy": policy})
    path = labs.folder / f"{name}.yaml"
    path.write_text(path.read_text().replace("max_epsilon: 100.0", "max_epsilon: 0.8"))
    assert command(labs, name, "report", "--out", str(tmp_path / "out")).startswith("0\n")
    data = (tmp_path / "out" / "report.json").read_bytes()
    assert verify(data).passed
    last = json.loads(data)["body"]["assumptions"][-1]
    assert (last["state"], last["because"].split(":")[0]) == (
        "open",
        "This run as a whole is above the limit that the silo has today",
    )


def test_every_command_that_reads_a_ledger_of_the_future_says_how_to_mend_it(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    config, identity = labs_pinned(labs, name), labs.site.identities[name]
    ahead = Ledger(Path(config.ledger), name, identity.sign, identity.key.public_bytes, clock=lambda: 2_100_000_000.0)
    with closing(ahead):
        ahead.open_run(run_terms(config, labs.accepted), [row.tobytes() for row in unit_ids_of(labs, name)], None)

    async def accept() -> str:
        async with labs.site.serving():
            return await asyncio.to_thread(command, labs, name, "accept", "--yes")

    said = [command(labs, name, "budget"), command(labs, name, "report"), asyncio.run(accept())]
    for told, code in zip(said, (0, 1, 0), strict=True):
        assert told.startswith(f"{code}\n"), told
        assert re.search(
            r"ledger.sqlite': its newest entry is of 2036-.* UTC, and the clock is behind that; set the clock, or if "
            r"it was wrong when that was written, run `fedclip-silo budget --clock-was-wrong`", told
        )  # fmt: skip
    assert json.loads(command(labs, name, "budget", "--json").splitlines()[1])["lifetime"]["share"] == 0


def test_accept_shows_the_limit_what_is_spent_and_what_the_plan_adds(tmp_path: Path) -> None:
    first, second, name = Labs.create(tmp_path / "first", cap=6.0), Labs.create(tmp_path / "second", cap=6.0), SILOS[0]
    text = (second.folder / f"{name}.yaml").read_text()
    shared = text.replace(second.configs[name].ledger, first.configs[name].ledger)

    def accept(labs: Labs) -> str:
        async def main() -> str:
            async with labs.site.serving():
                return await asyncio.to_thread(command, labs, name, "accept", "--yes")

        return asyncio.run(main())

    said = accept(first)
    assert said.endswith(
        "next: `fedclip-silo extract`, `fedclip-silo audit`, and an hour later or more `fedclip-silo train`\n"
    )
    limit = r"policy.max_epsilon is 6 \(delta 1e-05\): of the limit's budget the unit charged most has spent "
    (share,) = re.findall(limit + r"0.0 % \(epsilon 0\); this run adds at most ([0-9.]+) %: it fits for every", said)
    begun(first, name, 1)
    (second.folder / f"{name}.yaml").write_text(shared)
    once = accept(second)
    found = re.search(
        limit + r"([0-9.]+) % \(epsilon [0-9.]+\), and ([0-9.]+) % with what is kept for other unfinished runs; this "
        r"run adds at most ([0-9.]+) %: (it .*)", once
    )  # fmt: skip
    assert found, once
    spent, kept, added = map(float, found.groups()[:3])
    assert (kept, added) == (float(share), float(share))
    assert spent == pytest.approx(kept / 2, abs=0.1)
    assert found[4] == "it fits for every unit" if 2 * kept <= 100 else found[4].startswith("it does not fit for that")
    budget = command(second, name, "budget")
    assert f"has spent {spent} % of the limit's budget (epsilon " in budget
    assert f"which may bring it to {kept} % of the limit's budget (epsilon " in budget
    assert f"has spent {spent} %" in accept(first), "its own run is not counted twice"
    assert f"this run adds at most {spent} %: it fits for every unit" in accept(first)


def test_limit_that_was_changed_is_told_by_accept_and_train(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path, cap=90.0), SILOS[0]
    begun(labs, name)
    policy = labs.configs[name].policy.model_copy(update={"max_epsilon": 100.0})
    labs.configs[name] = labs.configs[name].model_copy(update={"policy": policy})
    path = labs.folder / f"{name}.yaml"
    path.write_text(path.read_text().replace("max_epsilon: 90.0", "max_epsilon: 100.0"))

    def stop(text: str) -> None:
        if "privacy: epsilon at most" in text:
            raise StoppedOnPurposeError

    async def both() -> str:
        async with labs.site.serving():
            said = await asyncio.to_thread(command, labs, name, "accept", "--yes")
            with pytest.raises(StoppedOnPurposeError):
                await labs.train(name, stop)
            return said

    said = asyncio.run(both())
    fact = "policy.max_epsilon was 90 (delta 1e-05) for the run of federation lung-xray (entry of 20"
    assert fact in said
    assert any(line.startswith(f"{name}: {fact}") for line in labs.heard[name])


def test_ledger_inside_of_the_silos_own_folder_is_named_by_accept_and_train(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    path, ledger = labs.folder / f"{name}.yaml", labs.configs[name].ledger
    assert about_place(labs.configs[name], path.parent) == (
        f"ledger {ledger} lies inside of {labs.folder}, this silo's own folder: what is spent in federations with "
        "another folder is not counted here, nor this there; before the first run, name one folder for the whole "
        "organisation as `ledger` in silo.yaml"
    )
    inside = labs.configs[name].model_copy(update={"ledger": f"{labs.configs[name].workdir}/ledger"})
    assert f"lies inside of {inside.workdir}, this" in str(about_place(inside, tmp_path / "other"))
    beside = labs.configs[name].model_copy(update={"ledger": str(tmp_path / "shared" / "ledger")})
    assert about_place(beside, tmp_path / "federation") is None

    async def main() -> list[str]:
        async with labs.site.serving():
            return [await asyncio.to_thread(command, labs, name, "accept", "--yes")]

    assert "this silo's own folder" in asyncio.run(main())[0]
    labs.site.home.folder.rename(tmp_path / "server that is gone")
    assert f"{name}: ledger {ledger} lies inside of {labs.folder}, this silo's own" in stopped_train(labs, name)


def stopped_train(labs: Labs, name: str) -> str:
    """What `train` prints until it waits for the server, which is down."""
    code = "from fedclip_cli.silo import main; main()"
    command = [sys.executable, "-c", code, "train", "--config", str(labs.folder / f"{name}.yaml")]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "400", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as made:
        assert made.stdout is not None
        heard = []
        for line in made.stdout:
            heard.append(line)
            if "trying again" in line:
                break
        made.kill()
    return "".join(heard)


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


def test_a_report_before_any_training_begins_no_ledger(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    config = labs.configs[name]
    body = json.loads(make_report(config, labs.site.identities[name], labs.accepted, None))["body"]
    assert body["ledger"]["entries"] == []
    assert not Path(config.ledger).exists()
    assert not note_of(config).exists()


def test_a_silo_that_stops_between_rounds_goes_on_with_the_same_run_and_pays_nothing_twice(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]

    def stop(text: str) -> None:
        if "round 1 of 2: averaged" in text:
            raise StoppedOnPurposeError

    async def main() -> None:
        async with labs.site.serving(), asyncio.timeout(BOUND):
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


def command(labs: Labs, name: str, *words: str, answer: str = "") -> str:
    """What another process of this silo prints, all of it."""
    words = (
        "-c",
        "from fedclip_cli.silo import main; main()",
        words[0],
        "--config",
        str(labs.folder / f"{name}.yaml"),
        *words[1:],
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "400"}
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True, text=True, timeout=BOUND, check=False, env=environment, input=answer,
    )  # fmt: skip
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def test_two_federations_of_one_organisation_are_trained_at_once_into_one_ledger(tmp_path: Path) -> None:
    first, second, name = Labs.create(tmp_path / "first"), Labs.create(tmp_path / "second"), SILOS[0]
    shared = first.configs[name].ledger
    second.configs[name] = second.configs[name].model_copy(update={"ledger": shared})

    async def main() -> None:
        async with first.site.serving(), second.site.serving(), asyncio.timeout(BOUND):
            await asyncio.gather(*(labs.train(silo) for labs in (first, second) for silo in SILOS))

    asyncio.run(main())
    entries = first.entries(name)
    found = kinds(entries)
    assert [found.count(kind) for kind in (Begin, Reserve, Settle)] == [2, 4, 4]
    for labs in (first, second):
        config = labs_pinned(labs, name)
        verdict = verify(make_report(config, labs.site.identities[name], labs.accepted, None))
        assert verdict.passed, verdict.failures


def test_budget_and_report_work_while_another_process_trains(tmp_path: Path) -> None:
    labs, name, said = Labs.create(tmp_path), SILOS[0], list[str]()

    def look(text: str) -> None:
        if "round 1 of 2: averaged" in text:
            said.extend(
                command(labs, name, *words) for words in (("budget",), ("report", "--out", str(tmp_path / "out")))
            )

    assert labs.run(lab_a={"say": look}) == [None] * 3
    budget, report = said
    assert "lung-xray (lab-a)" in budget
    assert re.search(
        r"0\n.* 1 of 2 .*has spent [0-9.]+ % of the limit's budget \(epsilon [0-9.]+ of 100, .*; [0-9]+ more round",
        budget,
        re.DOTALL,
    )
    plan = labs.accepted.contract.digest.hex()[:8]
    assert f"lung-xray (lab-a, plan {plan}): 1 round(s); `fedclip-silo budget --end FEDERATION` frees" in budget
    assert report.startswith("0\n"), report
    body = json.loads((tmp_path / "out/report.json").read_bytes())["body"]
    assert (body["ledger"]["uploaded"], body["claim"]["spent"]["trained"]) == ([1], [1])


def test_train_says_which_ledger_it_writes_into_and_what_that_remembers(tmp_path: Path) -> None:
    first, second, name = Labs.create(tmp_path / "first"), Labs.create(tmp_path / "second"), SILOS[0]
    ledger = first.configs[name].ledger
    second.configs[name] = second.configs[name].model_copy(update={"ledger": ledger})
    for labs in (first, second):
        labs.run(**{silo.replace("-", "_"): {"say": copy_then_stop_at_one} for silo in SILOS})
    new = f"{name}: `train` begins a new ledger at '{ledger}'; nothing spent before is remembered"
    assert new in first.heard[name]
    assert new not in second.heard[name]
    (known,) = (line for line in second.heard[name] if "it remembers" in line)
    day = r"20[0-9]{2}-[01][0-9]-[0-3][0-9]"
    told = (
        rf"{name}: ledger {ledger}: first entry {day}, newest {day}; it remembers 1 run\(s\) \(1 of lung-xray\) and 5"
    )
    assert re.match(told, known), known


def test_accept_says_which_ledger_before_a_person_consents(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]

    async def accept() -> str:
        async with labs.site.serving():
            return await asyncio.to_thread(command, labs, name, "accept", "--yes")

    said = asyncio.run(accept())
    assert f"`train` begins a new ledger at '{labs.configs[name].ledger}'; nothing spent before is remembered" in said
    assert not Path(labs.configs[name].ledger).exists(), "it is begun by a run"
    account = Account.opened(labs.configs[name], labs.site.identities[name], labs.accepted)
    account.begin(unit_ids_of(labs, name), changed_data=False)
    account.close()
    assert f"ledger {labs.configs[name].ledger}: first entry 20" in asyncio.run(accept())


def begun(labs: Labs, name: str, *rounds: int) -> None:
    """A run in the ledger, without a federation."""
    account = Account.opened(labs.configs[name], labs.site.identities[name], labs.accepted)
    account.begin(unit_ids_of(labs, name), changed_data=False)
    for number in rounds:
        with account.charged(number):
            pass
    account.close()


def test_ledger_behind_a_link_is_found_to_be_restored_by_whichever_name(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    link, real = tmp_path / "link", tmp_path / "storage" / "ledger"
    real.parent.mkdir()
    link.symlink_to(real)
    plain = labs.configs[name]
    labs.configs[name] = linked = plain.model_copy(update={"ledger": str(link)})
    begun(labs, name)
    backup = tmp_path / "backup"
    shutil.copytree(real, backup)
    begun(labs, name, 1)
    note = real.with_name("ledger.head")
    assert (note_of(linked), note.exists(), link.with_name("link.head").exists()) == (note, True, False)
    shutil.rmtree(real)
    shutil.copytree(backup, real)
    for config in (linked, plain.model_copy(update={"ledger": str(real)})):
        with pytest.raises(
            TrustError, match=rf"^'{real}/ledger.sqlite': lacks the entry that was written last.*restore the"
        ):
            open_ledger(config, labs.site.identities[name])
    note.rename(link.with_name("link.head"))  # as version 0.1 kept it
    with pytest.raises(TrustError, match="lacks the entry that was written last"):
        open_ledger(linked, labs.site.identities[name])
    shutil.rmtree(real)
    with pytest.raises(TrustError, match=rf"^{real}: is gone, and {link}.head says that there was a ledger"):
        open_ledger(linked, labs.site.identities[name])


def test_note_beside_the_ledger_is_never_put_back_by_whoever_comes_later(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    begun(labs, name)
    slow = open_ledger(labs.configs[name], labs.site.identities[name])
    begun(labs, name, 1)
    slow.note_newest(note_of(labs.configs[name]))
    with closing(open_ledger(labs.configs[name], labs.site.identities[name])) as ledger:
        assert note_of(labs.configs[name]).read_text() == f"{ledger.head.hex()}\n"
        assert len(ledger.entries()) == 3
    slow.close()


def test_budget_ends_a_run_that_will_never_be_finished(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    said = command(labs, name, "budget", "--end", "lung-xray")
    assert (
        said == f"1\nerror: '{labs.configs[name].ledger}': there is no ledger; `ledger` in silo.yaml names it, and "
        "`train` begins it\n"
    )
    begun(labs, name, 1)
    said = command(labs, name, "budget", "--end", "hearts")
    assert (
        "lab-a has no unfinished run of a federation hearts here; unfinished are: lung-xray at lab-a (plan "
        f"{labs.accepted.contract.digest.hex()[:8]}, begun 20" in said
    )
    said = command(labs, name, "budget", "--end", "lung-xray")
    assert re.search(
        r"(?s)This ends for good: lung-xray at lab-a \(plan [0-9a-f]{8}, begun 20[-0-9]+\): 1 round\(s\)\. Nothing "
        r"more can be trained there; what was spent stays spent, .* End it\? .*input is no terminal.*--yes", said
    )  # fmt: skip
    said = command(labs, name, "budget", "--end", "lung-xray", answer="n\n")
    assert "error: nothing was ended; `fedclip-silo train` goes on with what is unfinished" in said
    assert kinds(labs.entries(name)) == [Begin, Reserve, Settle]
    said = command(labs, name, "budget", "--end", "lung-xray", "--yes")
    assert "ended: nothing more is paid for in lung-xray; 1 round(s) are free again" in said
    assert "lung-xray (lab-a), records, ended" in said
    assert "--end FEDERATION" not in said
    assert kinds(labs.entries(name)) == [Begin, Reserve, Settle, End]
    labs.entries(name)  # and the note goes with it
    with pytest.raises(ConfigError, match="no unfinished run"):
        end_runs(labs.configs[name], labs.site.identities[name], "lung-xray")


def test_budget_mends_a_clock_and_the_report_says_so(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    config, identity = labs_pinned(labs, name), labs.site.identities[name]
    in_2036 = 2_100_000_000.0
    folder = Path(config.ledger)
    with closing(Ledger(folder, name, identity.sign, identity.key.public_bytes, clock=lambda: in_2036)) as ahead:
        ids = [row.tobytes() for row in unit_ids_of(labs, name)]
        ahead.open_run(run_terms(config, labs.accepted), ids, cap_of(config.policy))
    with pytest.raises(DataError, match=r"newest entry is of 2036-.*run `fedclip-silo budget --clock-was-wrong`"):
        begun(labs, name, 1)
    said = command(labs, name, "budget", "--clock-was-wrong")
    assert "noted and signed: the clock was ahead" in said
    assert "not ahead of the clock; there is nothing to mend" in command(labs, name, "budget", "--clock-was-wrong")
    begun(labs, name, 1)
    assert kinds(labs.entries(name)) == [Begin, Clock, Reserve, Settle]
    with pytest.raises(ConfigError, match="nothing to mend"):
        mend_clock(config, identity)
    data = make_report(config, identity, labs.accepted, None)
    assert verify(data).passed
    states = {item["id"]: item for item in json.loads(data)["body"]["assumptions"]}
    assert states["clock"]["state"] == "open"
    assert "The silo declared that its clock had been wrong." in states["clock"]["because"]


def test_terms_of_a_run_name_the_program_and_what_was_done_to_ids_of_patients(tmp_path: Path) -> None:
    of_records, of_patients = Labs.create(tmp_path / "records"), Labs.create(tmp_path / "patients", unit="patient")
    data = ManifestData(format="manifest", path="x.csv", patients=Patients(normalise=["casefold"]))
    config = of_records.configs[SILOS[0]].model_copy(update={"data": data})
    assert run_terms(config, of_records.accepted).patients == ()
    found = run_terms(config, of_patients.accepted)
    assert (found.patients, found.code) == (("casefold",), code_sha256())
    plain = FolderData(format="folder", path="x")
    assert run_terms(config.model_copy(update={"data": plain}), of_patients.accepted).patients == ()


def test_receipts_of_a_journal_that_was_restored_are_not_taken_for_all(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    identity, workdir = labs.site.identities[name], Path(labs.configs[name].workdir)
    roster = labs.accepted.roster.digest
    assert read_receipts(workdir, identity.epoch_path, roster) == ()
    backups = []

    def copy(text: str) -> None:
        if "round 1 of 2: averaged" in text:
            backups.append((workdir / "journal.sqlite").read_bytes())

    assert labs.run(lab_a={"say": copy}) == [None] * 3
    assert len(read_receipts(workdir, identity.epoch_path, roster)) == 2
    database = workdir / "journal.sqlite"
    for damage, kind, said in (
        (backups[0], TrustError, "does not match .*restored from a backup, or lost, and receipts may be missing"),
        (b"garbage" * 1000, DataError, "its receipts cannot be read .*not a database.*run `fedclip-silo recover`"),
    ):
        database.write_bytes(damage)
        with pytest.raises(kind, match=said):
            read_receipts(workdir, identity.epoch_path, roster)
    database.unlink()
    with pytest.raises(DataError, match=r"cannot be read .*run `fedclip-silo recover`"):
        read_receipts(workdir, identity.epoch_path, roster)
    assert not database.exists()


def test_receipts_wait_for_a_write_and_take_back_what_a_killed_process_left(tmp_path: Path) -> None:
    labs, name = Labs.create(tmp_path), SILOS[0]
    assert labs.run() == [None] * 3
    identity, workdir = labs.site.identities[name], Path(labs.configs[name].workdir)
    killed = tmp_path / "killed"
    with closing(sqlite3.connect(workdir / "journal.sqlite", isolation_level=None)) as sql:
        sql.executescript("PRAGMA cache_size=1; PRAGMA cache_spill=1; BEGIN; UPDATE epoch SET number = 0;")
        sql.execute("DELETE FROM receipts")
        sql.executemany("INSERT INTO receipts VALUES (randomblob(32), 1, 1, randomblob(4000))", [()] * 50)
        shutil.copytree(workdir, killed)  # some of it is in the file
        sql.execute("ROLLBACK")
    for folder in (workdir, killed):
        assert len(read_receipts(folder, identity.epoch_path, labs.accepted.roster.digest)) == 2


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
