"""A silo's person who makes every mistake, against a real coordinator on loopback."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fedclip_cli import silo

from fedclip_secure.aggregator.home import Home
from fedclip_secure.aggregator.serve import serve
from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import FederationLock, write_lock
from fedclip_secure.config.silo import read_silo
from fedclip_secure.model.state import AdapterState
from fedclip_secure.pki.roster import Roster
from fedclip_secure.silo.accepted import Accepted, load_accepted, save_accepted
from tests.cli.test_agg_mistakes import refused, run
from tests.config.test_lock import LOCK
from tests.waiting import BOUND

NAMES = ("silo-a", "silo-b", "silo-c")


@dataclass
class Site:
    """A served federation and the silos' folders beside it."""

    folder: Path
    url: str

    @property
    def home(self) -> str:
        return str(self.folder / "lung")

    def token(self, name: str, valid: str = "1h") -> str:
        return run("invite", name, "--dir", self.home, "--valid", valid).output.split("fedclip-", 1)[1].split()[0]

    def config(self, name: str) -> Path:
        return self.folder / name / "silo.yaml"

    def silo(self, command: str, name: str = "silo-a", *more: str, answer: str | None = None) -> str:
        result = run(command, "--config", str(self.config(name)), *more, program=silo.main, input=answer)
        assert result.exit_code == 0, result.output
        return result.output

    def refused(self, said: str, command: str, *more: str, name: str = "silo-a", code: int = 1) -> str:
        return refused(said, command, "--config", str(self.config(name)), *more, code=code, program=silo.main)

    def enroll(self, name: str, *more: str) -> str:
        result = run(
            "enroll", self.url, "--token", f"fedclip-{self.token(name)}", "--config", str(self.config(name)), *more,
            program=silo.main,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        return result.output

    def frozen(self) -> Site:
        for name in NAMES:
            self.enroll(name)
        assert run("freeze", "--dir", self.home).exit_code == 0
        return self

    def edit(self, old: str, new: str, name: str = "silo-a") -> None:
        text = self.config(name).read_text()
        assert old in text
        self.config(name).write_text(text.replace(old, new))


def _prepare(home: Home, **locked: object) -> None:
    """What `prepare` writes, without torch."""
    initial = AdapterState.from_arrays({"w": np.zeros((2, 3), np.float32)})
    data = initial.to_safetensors()
    home.initial_path.write_bytes(data)
    lock = {
        **LOCK,
        "plan": home.plan().digest.hex(),
        "layout": [{"name": "w", "shape": [2, 3]}],
        "initial_model": initial.digest.hex(),
        "initial_file": hashlib.sha256(data).hexdigest(),
        **locked,
    }
    write_lock(home.lock_path, check(lock, FederationLock, "lock"))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ("init", str(tmp_path / "lung"), "--name", "lung", "--hosts", "localhost", "--port", str(port))
    assert run(*arguments).exit_code == 0
    home = Home(tmp_path / "lung")
    _prepare(home)
    said: list[str] = []
    loop, stop, up = asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    def tell(line: str) -> None:
        said.append(line)
        up.set()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve(home, "127.0.0.1", port, tell, stop)))
    thread.start()
    assert up.wait(BOUND), said
    yield Site(tmp_path, f"https://localhost:{port}")
    loop.call_soon_threadsafe(stop.set)
    thread.join(BOUND)
    assert not thread.is_alive()
    loop.close()


def test_mistakes_of_enrolment_end_in_one_message_each(site: Site) -> None:
    token = f"fedclip-{site.token('silo-a')}"
    site.refused("must begin with 'fedclip-'", "enroll", site.url, "--token", "x")
    site.refused("cut short or mistyped", "enroll", site.url, "--token", token[:-5])
    site.refused("must be https://HOST", "enroll", "localhost", "--token", token)
    site.refused(
        "certificate is for another host", "enroll", site.url.replace("localhost", "127.0.0.1"), "--token", token
    )
    assert not (site.folder / "silo-a" / "identity" / "enrolment.json").exists()
    site.enroll("silo-a")
    site.refused(
        "the token is for 'silo-b'; use the right one", "enroll", site.url, "--token", f"fedclip-{site.token('silo-b')}"
    )
    site.refused("not known here", "enroll", site.url, "--token", token)
    key = (site.folder / "silo-a" / "identity" / "key.pem").read_bytes()
    site.enroll("silo-a")
    assert (site.folder / "silo-a" / "identity" / "key.pem").read_bytes() == key, "a second enrolment keeps the key"


def test_used_and_expired_tokens_are_refused(site: Site) -> None:
    token = f"fedclip-{site.token('silo-a')}"
    expired = f"fedclip-{site.token('silo-b', '1s')}"
    assert (
        run("enroll", site.url, "--token", token, "--config", str(site.config("silo-a")), program=silo.main).exit_code
        == 0
    )
    site.refused("used already, with another key", "enroll", site.url, "--token", token, name="copy")
    threading.Event().wait(1.1)
    site.refused(
        "token for silo-b has expired; ask the coordinator", "enroll", site.url, "--token", expired, name="silo-b"
    )


def test_enroll_says_what_is_left_to_set(site: Site) -> None:
    accept = "when the coordinator has frozen the roster, run `fedclip-silo accept`\n"
    assert site.enroll("silo-a").endswith(f"next: set `data` in {site.config('silo-a')}; {accept}")
    assert site.enroll("silo-b", "--images", "xrays").endswith(f"next: {accept}")
    assert site.enroll("silo-a").endswith(f"next: {accept}"), "silo.yaml was there"


def test_options_of_an_enrolment_that_failed_count_at_the_next_try(site: Site) -> None:
    token = ("--token", f"fedclip-{site.token('silo-a')}")
    wrong = site.url.replace("localhost", "127.0.0.1")
    site.refused("certificate is for another host", "enroll", wrong, *token, "--images", "one", "--weights", "w.pt")
    assert not site.config("silo-a").exists()
    site.silo("enroll", "silo-a", site.url, *token, "--images", "two", "--weights", "v.pt")
    config = read_silo(site.config("silo-a"))
    assert (config.data.path, config.weights) == tuple(str(site.folder / "silo-a" / name) for name in ("two", "v.pt"))


@pytest.mark.parametrize(("key", "option"), [("data.path", "--images"), ("weights", "--weights")])
def test_option_that_silo_yaml_contradicts_is_never_ignored(site: Site, key: str, option: str) -> None:
    site.enroll("silo-a", option, "mine")
    before = site.config("silo-a").read_bytes()
    site.enroll("silo-a", option, "mine")
    token = ("--token", f"fedclip-{site.token('silo-a')}")
    said = rf"silo.yaml': is there already, and `{key}` in it is '.*mine', not 'other'; .*leave out {option}"
    site.refused(said, "enroll", site.url, *token, option, "other")
    assert site.config("silo-a").read_bytes() == before


def test_key_on_a_disk_without_permissions_is_refused_before_the_token_is_spent(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = ("--token", f"fedclip-{site.token('silo-a')}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", _without_modes)
        said = "identity': lies on a disk that keeps no permissions .*others on this machine could use the private key"
        output = site.refused(said, "enroll", site.url, *token)
    assert "run this in a folder on a local disk" in output
    assert "chmod" not in output
    assert not any(path.is_file() for path in site.config("silo-a").parent.rglob("*"))
    site.silo("enroll", "silo-a", site.url, *token)


def _without_modes(path: str | Path | int, real: Callable[..., os.stat_result] = os.stat, **options: Any) -> Any:
    """As FAT and NTFS are often mounted: every file has mode 0755, whatever `chmod` said."""
    status = real(path, **options)
    return os.stat_result((stat.S_IFMT(status.st_mode) | 0o755, *status[1:]))


def test_disk_that_cannot_lock_is_named_before_anything_is_written(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    token = ("--token", f"fedclip-{site.token('silo-b')}")
    site.frozen().silo("accept", "silo-a", "--yes")
    before = _written(site)
    for lock in ("flock", "lockf"):
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, lock, _no_locks)
            said = r"{}': lies on a disk that cannot lock files \(No locks available\), as some network disks; .*{}"
            site.refused(
                said.format("identity", "run this in a folder on a local disk"), "enroll", site.url, *token, name="b"
            )
            site.refused(said.format("identity", "set `identity` in silo.yaml"), "train")
            refused(said.format("state", "to a local disk"), "serve", "--dir", site.home)
    assert _written(site) == before


def _written(site: Site) -> dict[Path, int]:
    """All files but those of the server, which runs; with the times of their last changes."""
    files = [path for path in site.folder.rglob("*") if path.is_file() and not path.is_relative_to(site.home)]
    return {path: path.stat().st_mtime_ns for path in files}


def _no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_accept_without_a_terminal_says_what_to_do(site: Site) -> None:
    said = site.frozen().refused("standard input is no terminal", "accept")
    assert "run it in one, or add --yes once you have compared the fingerprints with the coordinator's" in said
    assert "Aborted" not in said
    assert "sha256:" not in site.config("silo-a").read_text()


def test_accept_takes_no_coordinators_word_that_a_plan_can_be_trained(site: Site) -> None:
    home = Home(Path(site.home))
    home.plan_path.write_text(home.plan_path.read_text().replace('name: "fedclip"', "name: discriminant"))
    _prepare(home)
    said = site.frozen().refused("method discriminant does not go with the rest of it:", "accept", "--yes")
    assert "training.rounds is 50, and must be 1: each record is added up once" in said
    assert "secure_aggregation.coordinate_clip is 0.1, and must be at least 1" in said
    assert "tell the coordinator, who needs a new federation" in said
    assert "sha256:" not in site.config("silo-a").read_text()


def test_commands_out_of_order_say_what_to_run_first(site: Site) -> None:
    for command in ("accept", "extract", "train", "evaluate"):
        site.refused("silo.yaml: is missing; `fedclip-silo enroll`", command)
    site.enroll("silo-a")
    site.refused("has not frozen the roster yet", "accept")
    for command in ("extract", "train", "evaluate"):
        site.refused("pins no plan and roster yet; run `fedclip-silo accept`", command)
    assert "sha256:" not in site.config("silo-a").read_text()


def test_declined_offer_pins_nothing_and_accepted_one_keeps_the_file(site: Site) -> None:
    site.frozen()
    before = site.config("silo-a").read_text()
    result = run("accept", "--config", str(site.config("silo-a")), program=silo.main, input="n\n")
    assert result.exit_code == 1
    assert "not accepted" in result.output
    assert site.config("silo-a").read_text() == before
    output = site.silo("accept", answer="y\n")
    assert "silo-a (you)" in output
    assert site.config("silo-a").read_text().startswith(before)
    site.refused(r"adapters/best\.safetensors': is missing; `fedclip-silo train` writes it", "evaluate")


def test_policy_stops_accept_with_code_3_and_pins_nothing(site: Site) -> None:
    site.frozen()
    site.edit("require_privacy: false", "require_privacy: true\n  max_epsilon: 8.0")
    site.refused("`policy.max_epsilon` needs `ledger`: .*name one folder for the whole organisation", "accept", "--yes")
    site.edit("# ledger: /srv/fedclip/ledger ", f"ledger: {site.folder}/ledger ")
    site.edit("min_silos: 3", "min_silos: 4")
    output = site.refused("silo-a does not take part", "accept", "--yes", code=3)
    assert "policy.require_privacy" in output
    assert "policy.min_silos is 4" in output
    assert "sha256:" not in site.config("silo-a").read_text()


def with_privacy(site: Site, method: str, **privacy: object) -> None:
    """Let the plan have privacy."""
    home = Home(Path(site.home))
    plan = home.plan().model_dump(mode="json") | {
        "classes": home.plan().classes,
        "method": {"name": method},
        "splits": {"train": 0.8, "validation": 0.0, "test": 0.2},
        "training": {"rounds": 5, "optimizer": {"lr": 1e-3}},
        "privacy": {"unit": "record", "sample_rate": 0.05, "steps_per_round": 30, "noise_multiplier": 1.0,
                    "max_grad_norm": 0.5, "update_divisor": 64.0, "delta": 1e-5, **privacy},
    }  # fmt: skip
    plan["secure_aggregation"]["weights"] = "equal"
    Path(site.home, "federation.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    _prepare(home, noise_multiplier=1.0)


def test_accept_says_that_a_release_of_a_step_is_not_charged_and_pins_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for careless in ("home", "serve"):  # a coordinator who looks at nothing
        monkeypatch.setattr(f"fedclip_secure.aggregator.{careless}.check_charges", lambda _: None)
    with_privacy(site, "feddat")
    site.frozen()
    output = site.refused("a step of feddat releases 1 noisy sum", "accept", "--yes")
    assert "and it releases 2; the coordinator must run `fedclip-agg prepare` again" in " ".join(output.split())
    assert "epsilon" not in output
    assert "sha256:" not in site.config("silo-a").read_text()


def test_accept_shows_for_what_whom_to_ask_and_what_becomes_of_the_model(site: Site) -> None:
    with Path(site.home, "federation.yaml").open("a") as file:
        file.write("purpose: triage, under evaluation\ncontact: privacy at the hospital\n")
    _prepare(Home(Path(site.home)))
    output = site.frozen().silo("accept", "silo-a", "--yes")
    assert re.search(r"purpose +triage, under evaluation", output)
    assert re.search(r"whom to ask +privacy at the hospital", output)
    assert re.search(r"what becomes of it +not stated in the plan", output)
    assert "accuracy" not in output
    assert output.endswith("next: `fedclip-silo extract`, then `fedclip-silo train`\n")


def test_accept_shows_what_the_noise_costs_where_the_plan_says_it(site: Site) -> None:
    shares = {"without_noise": {"normal": 0.9, "pneumonia": 0.8}, "with_noise": {"normal": 0.9, "pneumonia": 0.6}}
    with_privacy(site, "linear_probe", accuracy={"data": "public X-rays", **shares})
    output = " ".join(site.frozen().silo("accept", "silo-a", "--yes").split())
    assert (
        "accuracy By these figures the noise costs pneumonia most (20.0 points), and normal least (0.0). "
        "The coordinator's word, measured on: public X-rays" in output
    )


def test_the_next_steps_after_accept_are_those_that_are_left(site: Site) -> None:
    site.frozen().silo("accept", "silo-a", "--yes")
    config = read_silo(site.config("silo-a"))
    models = Path(config.workdir, "adapters", "models.json")
    models.parent.mkdir()
    models.write_text(json.dumps({"plan": config.plan, "models": ["00" * 32] * 2}))
    output = site.silo("accept", "silo-a", "--yes")
    assert output.endswith("the run has come to its end. next: `fedclip-silo evaluate`, and `fedclip-silo report`\n")
    models.write_text("damaged")
    assert site.silo("accept", "silo-a", "--yes").endswith("then `fedclip-silo train`\n")


def test_garbage_in_every_file_of_a_silo_is_named_and_left_alone(site: Site) -> None:
    site.frozen().silo("accept", "silo-a", "--yes")
    folder = site.folder / "silo-a"
    for name in ("work/contract.cbor", "work/roster.cbor", "identity/enrolment.json", "identity/key.pem",
                 "identity/certificate.pem", "identity/authority.pem", "silo.yaml"):  # fmt: skip
        path = folder / name
        before = path.read_bytes()
        path.write_bytes(b"\xff garbage")
        site.refused(path.name, "train")
        assert path.read_bytes() == b"\xff garbage"
        path.unlink()
        site.refused(f"{path.name}|holds no identity", "train")
        path.write_bytes(before)
        if name == "identity/key.pem":
            path.chmod(0o600)
    adapters = folder / "work" / "adapters"
    adapters.mkdir()
    (adapters / "best.safetensors").write_bytes(b"garbage")
    site.refused(r"best\.safetensors: is not a safetensors file .*get it again", "evaluate")


def test_key_that_others_may_read_is_refused_with_the_command_that_mends_it(site: Site) -> None:
    site.enroll("silo-a")
    (site.folder / "silo-a" / "identity" / "key.pem").chmod(0o644)
    site.refused("run `chmod 600", "accept")


def test_workdir_that_cannot_be_made_is_named(site: Site) -> None:
    site.frozen().edit("workdir: work", "workdir: silo.yaml/x")
    site.refused("silo.yaml/x': cannot be made", "accept", "--yes")


def test_another_key_after_the_freeze_is_refused_before_anything_is_pinned(site: Site) -> None:
    """Somebody copied silo-b's identity over silo-a's folder, name and all."""
    site.frozen()
    mine, other = (site.folder / name / "identity" for name in ("silo-a", "silo-b"))
    for name in ("key.pem", "certificate.pem"):
        (mine / name).write_bytes((other / name).read_bytes())
    site.refused("the certificate was issued to silo-b, not to silo-a", "accept", "--yes")


def test_roster_with_another_key_for_this_silo_stops_train_before_it_connects(site: Site) -> None:
    site.frozen().silo("accept", "silo-a", "--yes")
    path = site.config("silo-a")
    accepted = load_accepted(read_silo(path))
    keys = {**dict(accepted.roster.members), "silo-a": Ed25519PrivateKey.generate().public_key().public_bytes_raw()}
    save_accepted(path, read_silo(path), Accepted(accepted.contract, Roster.of(keys)), None)
    site.refused("the roster holds another key for silo-a than", "train")


def test_packages_that_train_lacks_are_told_before_it_connects(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.frozen().silo("accept", "silo-a", "--yes")
    monkeypatch.setitem(sys.modules, "opacus", None)
    before = sorted(site.folder.rglob("*"))
    site.refused(r"the package 'opacus' is not installed here; run `.* -m pip install .*\"opacus>=", "train")
    assert sorted(site.folder.rglob("*")) == before


def test_server_that_is_down_ends_accept_after_a_few_tries(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedclip_secure.transport import client

    site.enroll("silo-a")
    enrolment = site.folder / "silo-a" / "identity" / "enrolment.json"
    enrolment.write_text(enrolment.read_text().replace(site.url, "https://localhost:1"))
    monkeypatch.setattr(client.Patience, "before", lambda self, next_try, asked: 0.01)
    output = site.refused("localhost:1: refuses connections; is it running", "accept")
    assert output.count("trying again") == 4


def test_proxy_that_cannot_be_used_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.enroll("silo-a")
    monkeypatch.setenv("HTTPS_PROXY", "ftp://x")
    site.refused("HTTPS_PROXY", "accept")


def test_path_that_the_system_refuses_ends_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    refused(
        "xxx': cannot be used .File name too long.; check the path", "accept", "--config", str(path), program=silo.main
    )


@pytest.mark.parametrize("columns", ["80", "120"])
def test_fingerprints_stand_unbroken_on_one_line_each(
    site: Site, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = site.frozen().silo("accept", "silo-a", "--yes").splitlines()
    assert max(map(len, lines)) <= max(int(columns), len(str(site.config("silo-a"))) + 80)
    found = [line for line in lines if re.search(r"([0-9a-f]{4} ){7}[0-9a-f]{4}", line)]
    assert [line.split()[0] for line in found] == ["aggregator", *NAMES]


def test_interrupt_ends_with_a_word_on_how_to_go_on(site: Site) -> None:
    """While it waits for a server that refuses connections."""
    arguments = ["enroll", "https://localhost:1", "--token", f"fedclip-{site.token('silo-a')}"]
    code = "from fedclip_cli.silo import main; main(prog_name='fedclip-silo')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=site.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    while "trying again" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=BOUND)
    assert process.returncode == 130
    assert errors == "stopped. `fedclip-silo enroll` goes on from here\n"
