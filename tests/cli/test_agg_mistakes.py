"""A coordinator who makes every mistake: one message, the right exit code, never a stack trace."""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fedclip_cli import agg, silo

from fedclip_secure.aggregator.home import Home
from fedclip_secure.aggregator.store import Member
from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import FederationLock, write_lock
from fedclip_secure.privacy.report.software import code_sha256, software
from tests.config.test_lock import LOCK
from tests.config.test_plan import PLAN


def run(*arguments: str, program: click.Group = agg.main, input: str | None = None) -> Result:
    result = CliRunner().invoke(program, list(arguments), input=input, terminal_width=120)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def refused(said: str, *arguments: str, code: int = 1, program: click.Group = agg.main) -> str:
    """Run, and expect one error that holds `said` (a pattern)."""
    result = run(*arguments, program=program)
    assert result.exit_code == code, result.output
    assert re.search(said, result.output, re.DOTALL), result.output
    assert result.output.lower().count("error: ") == 1, result.output
    return result.output


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "lung"
    assert run("init", str(folder), "--name", "lung", "--hosts", "localhost", "--port", "8443").exit_code == 0
    return folder


@pytest.fixture
def locked(home: Path) -> Path:
    """A home after `prepare`, without torch: its lock names a plan of the same digest."""
    from fedclip_secure.aggregator.home import Home

    (home / "federation.yaml").write_text(json.dumps({**PLAN, "secure_aggregation": {}}))
    plan = Home(home).plan()
    write_lock(home / "federation.lock", check({**LOCK, "plan": plan.digest.hex()}, FederationLock, "lock"))
    return home


@pytest.mark.parametrize("program", [agg.main, silo.main], ids=["agg", "silo"])
@pytest.mark.parametrize("width", [80, 120])
def test_help_of_every_command_opens_with_what_it_does_and_ends_with_an_example(
    program: click.Group, width: int
) -> None:
    for name, command in program.commands.items():
        text = CliRunner().invoke(program, [name, "--help"], terminal_width=width).output
        lines = [line for line in text.splitlines() if line.strip()]
        assert command.help
        assert lines[1].strip().split()[0] == command.help.split()[0]
        assert "Example: fedclip-" in text[text.index("Options:") :]
        assert max(map(len, lines)) <= width, name


@pytest.mark.parametrize("program", [agg.main, silo.main], ids=["fedclip-agg", "fedclip-silo"])
def test_version_tells_the_hash_of_the_code_which_reports_name(
    program: click.Group, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    done = CliRunner().invoke(program, ["--version"], prog_name=name)
    assert done.exit_code == 0
    assert done.output == f"{name}, version {version('fedclip-secure')}\ncode {code_sha256()}\n"
    assert software([])["code"] == code_sha256()


@pytest.mark.parametrize("name", ["Lung", "a b", "", "aggregator", "x" * 64, "é"])
def test_init_refuses_a_name_before_it_writes_anything(tmp_path: Path, name: str) -> None:
    refused("cannot be a name; use a-z, 0-9 and -", "init", str(tmp_path / "f"), "--name", name, "--hosts", "localhost")
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("hosts", ["https://x", "x:443", "a b", " , ", "-x", "x_y"])
def test_init_refuses_a_host(tmp_path: Path, hosts: str) -> None:
    said = "neither a DNS name nor an IP address|needs at least one host"
    refused(said, "init", str(tmp_path / "f"), "--name", "lung", "--hosts", hosts)
    assert not (tmp_path / "f" / "federation.yaml").exists()


def test_init_twice_changes_nothing(home: Path) -> None:
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    refused("is there already; choose an empty folder", "init", str(home), "--name", "lung", "--hosts", "localhost")
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_init_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(
        "file/sub.*choose another folder", "init", str(tmp_path / "file/sub"), "--name", "a", "--hosts", "localhost"
    )
    refused("is a file", "init", str(tmp_path / "file"), "--name", "a", "--hosts", "localhost", code=2)


@pytest.mark.parametrize("command", ["prepare", "freeze", "serve", "status", "invite a", "export"])
def test_every_command_says_where_it_looked_for_the_federation(tmp_path: Path, command: str) -> None:
    refused(
        "federation.yaml': is missing.*`fedclip-agg init`.*--dir", *command.split(), "--dir", str(tmp_path / "none")
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b"- a\n", b"a: [", b"federation: x\nfederation: y"])
@pytest.mark.parametrize("command", ["freeze", "serve", "status", "invite a", "export"])
def test_garbage_in_the_plan_is_refused_by_name(home: Path, command: str, garbage: bytes) -> None:
    (home / "federation.yaml").write_bytes(garbage)
    refused(r"federation\.yaml: ", *command.split(), "--dir", str(home))


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["init"], ["init", "x"], ["invite"], ["serve", "--port", "1"], ["init", "x", "--port", "0"]],
)
def test_wrong_usage_has_code_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.output


@pytest.mark.parametrize("silo_name", ["St-Marys", "aggregator", "a b", "", "x" * 64])
def test_invite_refuses_a_name(home: Path, silo_name: str) -> None:
    refused("cannot be a silo's name; use a-z, 0-9 and -", "invite", silo_name, "--dir", str(home))


@pytest.mark.parametrize("valid", ["0d", "7", "soon", "-1d", "1.5h", ""])
def test_invite_refuses_a_duration(home: Path, valid: str) -> None:
    refused("must be a duration such as 30s, 10m, 2h or 1d", "invite", "a", "--dir", str(home), f"--valid={valid}")


def test_invited_silos_are_listed_and_tokens_are_not_kept(home: Path) -> None:
    token = run("invite", "st-marys", "--dir", str(home)).output.split()[-1]
    output = run("status", "--dir", str(home)).output
    assert "enrolling" in output
    assert "st-marys" in output
    listed = json.loads(run("status", "--dir", str(home), "--json").output)
    assert listed["silos"][0]["name"] == "st-marys"
    for path in home.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes()


def test_a_second_token_says_that_the_first_is_void(home: Path) -> None:
    said = "the earlier token for st-marys, which was not used, is void"
    assert said not in run("invite", "st-marys", "--dir", str(home)).output
    assert run("invite", "st-marys", "--dir", str(home)).output.startswith(said)
    assert len(run("invite", "st-marys", "--dir", str(home), "--token-only").output.split()) == 1


def test_freeze_before_prepare_says_what_to_run(home: Path) -> None:
    refused("federation.lock: is missing; run `fedclip-agg prepare`", "freeze", "--dir", str(home))


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff", b"[]", b"null", b"[" * 50_000])
def test_garbage_in_the_lock_is_refused_by_name(home: Path, garbage: bytes) -> None:
    (home / "federation.lock").write_bytes(garbage)
    refused(r"federation\.lock: ", "freeze", "--dir", str(home))


def test_freeze_without_silos_says_to_invite(locked: Path) -> None:
    refused("0 silo.*needs 3; invite more", "freeze", "--dir", str(locked))


def test_freeze_after_an_edit_says_to_prepare_again(locked: Path) -> None:
    plan = locked / "federation.yaml"
    plan.write_text(plan.read_text().replace('"rounds": 50', '"rounds": 51'))
    refused("has changed since `prepare`; run `fedclip-agg prepare` again", "freeze", "--dir", str(locked))


@pytest.mark.parametrize("listen", ["8443", "localhost", "localhost:99999", ":", "localhost:x", "[::1"])
def test_serve_refuses_an_address(home: Path, listen: str) -> None:
    refused("--listen .*must be HOST:PORT, as 0.0.0.0:443", "serve", "--dir", str(home), "--listen", listen)


@pytest.mark.parametrize("path", ["server/key.pem", "server/certificate.pem", "authority/authority.pem"])
@pytest.mark.parametrize("damage", ["garbage", "missing"])
def test_serve_names_the_key_or_certificate_at_fault(home: Path, path: str, damage: str) -> None:
    (home / path).unlink()
    if damage == "garbage":
        (home / path).write_bytes(b"garbage")
        (home / path).chmod(0o600)
    refused(
        rf"{path}.*(restore|get it again)", "serve", "--dir", str(home), "--listen", "192.0.2.1:1"
    )  # where nothing can listen


@pytest.mark.parametrize("command", ["invite a", "status", "export"])
def test_damaged_database_is_refused_and_left_as_it_is(home: Path, command: str) -> None:
    run("invite", "a", "--dir", str(home))
    database = home / "state" / "aggregator.sqlite"
    for extra in ("-wal", "-shm"):
        database.with_name(f"aggregator.sqlite{extra}").unlink(missing_ok=True)
    database.write_bytes(b"garbage" * 1000)
    refused(r"aggregator\.sqlite': is damaged as the aggregator's state", *command.split(), "--dir", str(home))
    assert database.read_bytes() == b"garbage" * 1000


def test_state_folder_that_is_a_file_is_refused(home: Path) -> None:
    shutil.rmtree(home / "state", ignore_errors=True)
    (home / "state").write_text("x")
    refused("state': cannot be used as the aggregator's state", "status", "--dir", str(home))


def test_message_cannot_steer_the_terminal(home: Path) -> None:
    (home / "federation.yaml").write_text('federation: "\\e[2Kevil"\n')
    output = refused("cannot be used", "status", "--dir", str(home))
    assert "\x1b[2K" not in output


def test_freeze_refuses_a_silo_that_a_methods_options_forget(tmp_path: Path) -> None:
    home = Home(tmp_path / "lung")
    made = run("init", str(home.folder), "--name", "lung", "--hosts", "localhost", "--method", "fedapt")
    assert made.exit_code == 0
    write_lock(home.lock_path, check({**LOCK, "plan": home.plan().digest.hex()}, FederationLock, "lock"))
    store = home.store()
    for name in ("silo-a", "silo-b", "lab-x"):
        key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
        store.enrol(b"", b"", Member(name, b"", key, 2e9))
    store.close()
    said = refused("method.domains lists lab-x nowhere", "freeze", "--dir", str(home.folder))
    assert "edit it, and run `fedclip-agg prepare` again" in said


def test_init_lists_the_methods_where_it_knows_the_one_named_not(tmp_path: Path) -> None:
    said = "--method clipfed: is unknown to this version; it has fedclip, linear_probe, private_prototypes"
    refused(said, "init", str(tmp_path / "x"), "--name", "x", "--hosts", "localhost", "--method", "clipfed")
    assert not (tmp_path / "x").exists()
