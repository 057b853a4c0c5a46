"""Root beside the user of the service: what only reads writes nothing, and what writes is refused."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from fedclip_cli import owner, silo

from fedclip_secure.config.silo import write_silo
from fedclip_secure.errors import ConfigError
from tests.cli.test_agg_mistakes import refused, run
from tests.federation.processes import ENVIRONMENT, free_port
from tests.users import NOBODY, give_away
from tests.waiting import BOUND, wait_for

_AS_USER = """
# Before: root's Python may be closed to others.
import encodings.idna, importlib.readers, os, sys
import fedclip_cli.agg, fedclip_secure.aggregator.home, fedclip_secure.aggregator.serve

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
fedclip_cli.agg.main(sys.argv[1:], prog_name="fedclip-agg")
"""


def _as_user(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`fedclip-agg` in a process of its own, of the user `nobody` where this one is root."""
    log = (folder / "log").open("a")
    command = [sys.executable, "-c", _AS_USER, *arguments]
    with log:
        return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, stdout=log, stderr=log)


def _ends(process: subprocess.Popen[str], log: Path) -> None:
    assert process.wait(BOUND) == 0, log.read_text()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of that user; pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        give_away(Path(name))
        yield Path(name)


@pytest.fixture
def home(folder: Path) -> Path:
    arguments = ("--name", "lung", "--hosts", "localhost", "--port", str(free_port()))
    _ends(_as_user(folder, "init", "lung", *arguments), folder / "log")
    _ends(_as_user(folder, "invite", "silo-a", "--dir", "lung"), folder / "log")
    return folder / "lung"


@pytest.fixture
def serving(home: Path) -> Iterator[subprocess.Popen[str]]:
    log, before = home.parent / "log", (home.parent / "log").read_text().count("open for enrolment")
    process = _as_user(home.parent, "serve", "--dir", "lung", "--listen", f"127.0.0.1:{free_port()}")
    try:
        wait_for("serving", lambda: log.read_text().count("open for enrolment") > before, process)
        yield process
    finally:
        process.terminate()
        process.wait(BOUND)


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests: the folders above are then another user's."""
    if os.geteuid() != 0:
        monkeypatch.setattr(owner, "owner_of_new", lambda _: 0)
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def _files(folder: Path) -> dict[str, tuple[int, int, int]]:
    status = {str(path): path.stat() for path in folder.rglob("*") if not path.is_dir()}
    return {path: (each.st_uid, each.st_size, each.st_mtime_ns) for path, each in status.items()}


def test_status_of_another_user_writes_nothing_and_the_server_starts_afterwards(
    home: Path, request: pytest.FixtureRequest
) -> None:
    before = _files(home)
    assert "silo-a" in run("status", "--dir", str(home)).output
    assert _files(home) == before
    server: subprocess.Popen[str] = request.getfixturevalue("serving")
    before = _files(home)
    assert '"serving": true' in run("status", "--dir", str(home), "--json").output
    assert _files(home).keys() == before.keys()
    assert {owner for owner, _, _ in _files(home).values()} == {home.stat().st_uid}
    assert server.poll() is None


def test_status_before_anything_was_done_makes_no_state(home: Path) -> None:
    for path in (home / "state").rglob("*"):
        if path.is_file():
            path.unlink()
    before = _files(home)
    assert "no silo was invited yet" in run("status", "--dir", str(home)).output
    assert _files(home) == before


def test_status_of_a_server_that_was_killed_reads_its_log_and_leaves_it(
    home: Path, serving: subprocess.Popen[str]
) -> None:
    _ends(_as_user(home.parent, "invite", "silo-b", "--dir", "lung"), home.parent / "log")
    serving.kill()
    serving.wait(BOUND)
    assert (home / "state" / "aggregator.sqlite-wal").stat().st_size
    before = _files(home)
    output = run("status", "--dir", str(home), "--json").output
    assert '"serving": false' in output
    assert "silo-b" in output
    assert _files(home).keys() == before.keys()


@pytest.mark.parametrize("command", ["prepare", "invite b", "freeze", "serve", "give-up --yes", "report", "export"])
def test_root_is_refused_before_it_writes_and_is_told_as_whom(home: Path, as_root: None, command: str) -> None:
    before = _files(home)
    user = "nobody" if home.stat().st_uid == NOBODY else ""
    said = rf"lung': belongs to user '.+', who could not use.*run it as that user: sudo -u {user}"
    refused(said, *command.split(), "--dir", str(home))
    assert _files(home) == before


def test_root_is_refused_in_a_folder_that_was_made_for_another_user(folder: Path, as_root: None) -> None:
    refused("belongs to user", "init", str(folder), "--name", "lung", "--hosts", "localhost")
    assert not list(folder.iterdir())


def test_of_a_user_whom_only_the_container_lacks_the_number_is_told(
    folder: Path, as_root: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, group = folder.stat().st_uid, folder.stat().st_gid

    def unknown(_: int) -> NoReturn:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(sys, "argv", ["/opt/fedclip/bin/fedclip-agg", "init"])
    said = (
        rf"as that user: in a container `docker run --user {number}:{group}`, else `setpriv --reuid {number} "
        rf"--regid {group} --clear-groups /opt/fedclip/bin/fedclip-agg init`"
    )
    output = refused("belongs to user", "init", str(folder), "--name", "lung", "--hosts", "localhost")
    assert re.search(said, " ".join(output.split())), output
    assert "sudo" not in output


@pytest.mark.parametrize("token", [["--token", "fcs1.secret"], ["--token=fcs1.secret"]])
def test_command_as_that_user_is_whole_but_for_a_token(
    folder: Path, as_root: None, monkeypatch: pytest.MonkeyPatch, token: list[str]
) -> None:
    """sudo has a PATH of its own, and a token on a screen is one that others can use."""
    words = ["enroll", "https://agg.example.org", "--images", "my scans", *token]
    monkeypatch.setattr(sys, "argv", ["bin/fedclip-silo", *words])
    with pytest.raises(ConfigError) as caught:
        owner.check_owner(folder)
    program = str(Path.cwd() / "bin/fedclip-silo")
    told = str(caught.value)
    assert re.search(
        rf"sudo -u \S+ {program} enroll https://agg\.example\.org --images 'my scans' --token[ =]TOKEN$", told
    ), told


def test_root_is_let_in_where_the_disk_gives_its_files_to_the_folders_owner(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all_squash of NFS does: this process makes files as the folder's owner, and takes itself for root."""
    before = os.geteuid()
    os.seteuid(folder.stat().st_uid)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: 0)
            owner.check_owner(folder)
    finally:
        os.seteuid(before)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["accept", "extract", "train", "recover", "evaluate", "report", "budget", "audit"])
def test_root_is_refused_in_the_folder_of_another_users_silo(folder: Path, as_root: None, command: str) -> None:
    write_silo(folder / "silo.yaml", "lab-a", "images", None)
    said = r"belongs to user '.+', .*run it as that user: sudo -u \S+ "
    refused(said, command, "--config", str(folder / "silo.yaml"), program=silo.main)
    assert [path.name for path in folder.iterdir()] == ["silo.yaml"]


def test_root_is_refused_to_write_into_the_workdir_of_another_user(tmp_path: Path, folder: Path, as_root: None) -> None:
    write_silo(tmp_path / "silo.yaml", "lab-a", "images", None)
    text = (tmp_path / "silo.yaml").read_text()
    (tmp_path / "silo.yaml").write_text(text.replace("workdir: work ", f"workdir: {folder} "))
    if tmp_path.stat().st_uid != 0:
        return  # the folder of silo.yaml is refused before it
    refused(
        f"'{folder}': belongs to user 'nobody'", "train", "--config", str(tmp_path / "silo.yaml"), program=silo.main
    )
