"""An installation that lacks packages of an extra, or a system that is not POSIX's: one line, and what helps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip_secure import extras
from fedclip_secure.aggregator.home import Home
from fedclip_secure.config.silo import read_silo
from fedclip_secure.errors import ConfigError
from fedclip_secure.extras import check_installed, install_command, lacking
from fedclip_secure.pki.roster import Roster
from fedclip_secure.silo.accepted import Accepted, save_accepted
from tests.config.test_lock import contract
from tests.config.test_plan import PLAN
from tests.waiting import BOUND

SILO = ["torch", "torchvision", "open_clip", "opacus", "PIL", "timm", "huggingface_hub"]
POSIX = ["fcntl", "pwd", "grp", "resource", "termios", "tty", "pty"]
# Runs a program as if the modules named first were not installed.
_WITHOUT = """
import sys
sys.modules |= dict.fromkeys(sys.argv[1].split(","))
from importlib import import_module
import_module(sys.argv[2]).main(sys.argv[3:], prog_name=sys.argv[2].replace("fedclip_cli.", "fedclip-"))
"""
# As on Windows: other people's packages are loaded as here, for there they find what they need; ours is loaded anew.
_ELSEWHERE = """
import os, signal, sys
from importlib import import_module
import_module("fedclip_secure.privacy.verification.verify"), import_module(sys.argv[2])
for name in [name for name in sys.modules if name.startswith("fedclip_")]:
    del sys.modules[name]
sys.modules |= dict.fromkeys(sys.argv[1].split(","))
for module, names in {os: "O_DIRECTORY O_NOFOLLOW fork getuid geteuid chown fchmod", signal: "SIGHUP SIGKILL"}.items():
    for name in names.split():
        delattr(module, name)
import_module(sys.argv[2]).main(sys.argv[3:], prog_name=sys.argv[2].replace("fedclip_cli.", "fedclip-"))
"""


def run(code: str, hidden: list[str], program: str, *arguments: str, folder: Path) -> tuple[int, str]:
    """Exit code and output of a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, ",".join(hidden), f"fedclip_cli.{program}", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
        timeout=BOUND,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_the_command_for_an_extra_lists_its_packages_and_never_this_one() -> None:
    command = install_command("silo")
    assert command.startswith(f"{sys.executable} -m pip install ")
    assert "fedclip" not in command.removeprefix(sys.executable)
    listed = {line.partition(";")[0].strip() for line in requires("fedclip-secure") or () if "'silo'" in line}
    assert set(command.split('"')[1::2]) == listed
    assert {"torch>=2.6", "open-clip-torch>=3.3"} <= listed
    assert ' -m pip install "pydicom>=3"' in install_command("dicom")


def test_a_path_with_a_space_stands_in_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/a folder/python")
    assert install_command("dicom").startswith('"/a folder/python" -m pip install "pydicom>=3"')


@pytest.mark.parametrize("marker", ['(python_version < "3.14") and ', "python_version < '3.14' and "])
def test_a_requirement_with_a_marker_of_its_own_keeps_it(monkeypatch: pytest.MonkeyPatch, marker: str) -> None:
    lines = ["numpy>=1.26", "torch>=2.6; extra == 'silo'", f"timm>=1; {marker}extra == 'silo'", "x; extra == 'silos'"]
    monkeypatch.setattr(extras, "requires", lambda _: lines)
    kept = marker.removesuffix(" and ").replace('"', "'")
    assert install_command("silo").endswith(f' -m pip install "torch>=2.6" "timm>=1; {kept}"')


def test_an_installation_that_lists_no_packages_is_never_told_to_install_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "requires", lambda _: None)
    told = lacking(ModuleNotFoundError("no", name="torch"))
    said = "install this program again from where it came from, with its extra `silo`"
    assert told == f"the package 'torch' is not installed here; {said}"


def test_only_a_missing_package_of_an_extra_is_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lacking(ModuleNotFoundError("no", name="torch.nn")) is not None
    assert lacking(ModuleNotFoundError("no", name="fedclip_secure.gone")) is None
    assert lacking(ImportError("broken", name="torch")) is None
    check_installed("silo", "training")
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(
        ConfigError, match=r"^training: the package 'opacus' is not installed here; run `.*opacus>=1\.6"
    ):
        check_installed("silo", "training")


def test_prepare_without_torch_says_how_the_lock_is_made_elsewhere_and_so_it_is(tmp_path: Path) -> None:
    home, elsewhere = Home(tmp_path / "lung"), tmp_path / "dir"
    made = run(_WITHOUT, SILO, "agg", "init", "lung", "--name", "lung", "--hosts", "localhost", folder=tmp_path)
    assert made[0] == 0, made[1]
    shipped = {"name": "fedclip-tiny", "pretrained": "shipped"}
    home.plan_path.write_text(json.dumps({**PLAN, "model": shipped, "initial": None}))
    code, said = run(_WITHOUT, SILO, "agg", "prepare", "--dir", "lung", folder=tmp_path)
    assert (code, said.count("error:"), len(said.splitlines())) == (1, 1, 1), said
    assert f"the package 'torch' is not installed here; run `{install_command('silo')}`" in said
    assert "copy DIR/federation.lock and DIR/initial.safetensors back into lung" in said
    assert not home.lock_path.exists()

    elsewhere.mkdir()
    shutil.copy(home.plan_path, elsewhere)
    code, said = run(_WITHOUT, ["pydicom"], "agg", "prepare", "--dir", "dir", folder=tmp_path)
    assert code == 0, said
    for name in ("federation.lock", "initial.safetensors"):
        shutil.copy(elsewhere / name, home.folder)
    code, said = run(_WITHOUT, SILO, "agg", "freeze", "--dir", "lung", folder=tmp_path)
    assert "invite" in said, said  # plan, lock and first adapter are as they must be: silos alone are missing
    assert home.contract().pin in run(_WITHOUT, [], "agg", "prepare", "--dir", "dir", folder=tmp_path)[1]


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("agg", ["demo"]),
        ("agg", ["simulate", "experiment.yaml", "--out", "out"]),
        ("silo", ["evaluate"]),
        ("silo", ["predict", "images"]),
        ("silo", ["report"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_command_without_a_silos_packages_ends_in_one_line(tmp_path: Path, program: str, arguments: list[str]) -> None:
    code, said = run(_WITHOUT, SILO, program, *arguments, folder=tmp_path)
    assert (code, len(said.splitlines())) == (1, 1), said
    assert f"error: `fedclip-{program} {arguments[0]}`: the package " in said
    assert said.rstrip().endswith(f"is not installed here; run `{install_command('silo')}`")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["extract", "personalize"])
def test_command_in_a_silos_folder_without_its_packages_ends_in_one_line(tmp_path: Path, command: str) -> None:
    config = tmp_path / "silo.yaml"
    config.write_text("name: lab\ndata: {format: folder, path: images}\n")
    names = ("aggregator", "lab", "other", "third")
    roster = Roster.of({name: Ed25519PrivateKey.generate().public_key().public_bytes_raw() for name in names})
    save_accepted(config, read_silo(config), Accepted(contract(), roster), None)
    code, said = run(_WITHOUT, SILO, "silo", command, folder=tmp_path)
    assert (code, len(said.splitlines())) == (1, 1), said
    assert said.rstrip().endswith(f"is not installed here; run `{install_command('silo')}`")


@pytest.mark.parametrize("program", ["agg", "silo"])
def test_programs_without_a_silos_packages_and_off_posix_systems_show_their_help(tmp_path: Path, program: str) -> None:
    for code, hidden in ((_WITHOUT, SILO), (_ELSEWHERE, POSIX)):
        assert run(code, hidden, program, "--help", folder=tmp_path)[0] == 0
        assert run(code, hidden, program, "--version", folder=tmp_path)[0] == 0
        assert run(code, hidden, program, "report", "--help", folder=tmp_path)[0] == 0


def test_reports_are_verified_off_posix_systems(tmp_path: Path) -> None:
    report = Path(__file__).parents[1] / "privacy" / "version1" / "silo.json"
    code, said = run(_ELSEWHERE, POSIX, "silo", "verify", str(report), folder=tmp_path)
    assert code == 0, said
    assert "consistent in itself" in said


@pytest.mark.parametrize(("program", "command"), [("silo", "budget"), ("agg", "status")])
def test_other_commands_say_that_they_need_a_posix_system(tmp_path: Path, program: str, command: str) -> None:
    code, said = run(_ELSEWHERE, POSIX, program, command, folder=tmp_path)
    assert (code, len(said.splitlines())) == (1, 1), said
    assert f"`fedclip-{program} {command}` locks files" in said
    assert "in WSL" in said
    assert not list(tmp_path.iterdir())
