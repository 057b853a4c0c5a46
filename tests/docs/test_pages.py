"""What the pages say holds: commands and options exist, links lead somewhere, YAML and messages are the program's."""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

import click
import pytest
from fedclip_cli.agg import main as agg
from fedclip_cli.silo import main as silo

from fedclip_secure.config.fields import check
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.config.yaml12 import read_yaml
from fedclip_secure.secagg.terms import threshold
from fedclip_secure.simulate.experiment import read_experiment
from tests.docs.pages import DOCS, PAGES, blocks, commands, prose, spans
from tests.federation.processes import ROOT

CONFIGS = sorted((ROOT / "silo_configs").glob("*.yaml"))
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
THREAT_MODEL = ROOT / "docs" / "threat-model.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
_FOLDERS = ("tests/", "docs/", "silo_configs/", "fedclip_secure/", "cli/", "tools/", "benchmarks/", "certs/")


def fault_of(call: list[str]) -> str | None:
    """Why a call cannot be typed; None where it can."""
    program, arguments = {"fedclip-agg": agg, "fedclip-silo": silo}[call[0]], call[1:]
    if not arguments or arguments[0] in ("-h", "--help", "--version"):
        return None
    command = program.commands.get(arguments[0])
    if command is None:
        return f"{call[0]} has no command {arguments[0]}"
    try:
        command.make_parser(click.Context(command)).parse_args(arguments[1:])
    except click.UsageError as error:
        return f"{' '.join(call)}: {error.format_message()}"
    return None


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_that_a_page_names_exists_with_its_options(page: Path) -> None:
    faults = [fault for call in commands(page) if (fault := fault_of(call)) is not None]
    assert not faults


def test_the_check_of_commands_finds_wrong_ones() -> None:
    assert fault_of(["fedclip-agg", "revoke", "st-marys"]) == "fedclip-agg has no command revoke"
    assert "No such option" in str(fault_of(["fedclip-silo", "train", "--give-away", "3"]))
    assert len(commands(TUTORIAL)) > 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_and_path_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = prose(page)
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (heading and heading not in _anchors(target)):
            missing.append(link)
    named = [span for span in spans(text) if span.startswith(_FOLDERS)]
    missing += [span for span in named if not (ROOT / span.partition("::")[0]).exists()]
    assert not missing


def test_every_room_and_file_of_the_architecture_is_there() -> None:
    named = set(spans(prose(ARCHITECTURE)))
    files = {span for span in named if span.endswith(".py")}
    rooms = {span for span in named if span.endswith("/")}
    there = {path.as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert len(files) > 40
    assert len(rooms) > 20
    assert {file for file in files if not any(path.endswith(f"/{file}") for path in there)} == set()
    assert {
        room for room in rooms if not any((base / room).is_dir() for base in (ROOT, ROOT / "fedclip_secure"))
    } == set()


def test_every_test_that_the_threat_model_names_exists() -> None:
    cited = [span.split("::") for span in spans(prose(THREAT_MODEL)) if span.startswith("tests/") and "::" in span]
    assert len(cited) > 20
    for path, name in cited:
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


def test_every_yaml_example_of_the_docs_is_taken_by_the_program(tmp_path: Path) -> None:
    whole = {
        FederationPlan: ROOT / "silo_configs" / "walkthrough.yaml",
        SiloConfig: ROOT / "silo_configs" / "silo.yaml",
    }
    examples = [(page, block) for page in DOCS for block in blocks(page) if block.language == "yaml"]
    assert len(examples) >= 6
    for page, block in examples:
        (tmp_path / "example.yaml").write_text(block.text)
        if block.words[-1] == "labs.yaml":
            read_experiment(tmp_path / "example.yaml")
            continue
        model = FederationPlan if block.words[-1] in ("plan", "lung-xray/federation.yaml") else SiloConfig
        values = read_yaml(tmp_path / "example.yaml")
        if len(block.words) == 1:  # some keys of a file, marked `plan` or `silo`
            values = {**read_yaml(whole[model]), **values}
        check(values, model, page.name)


def test_every_message_in_the_table_of_failures_is_one_of_the_program() -> None:
    table = TUTORIAL.read_text().split("## What failures look like")[1].split("\n## ")[0]
    quoted = [spans(row.split("|")[1]) for row in table.splitlines() if row.startswith("| ")][2:]
    said = "\n".join(
        node.value
        for folder in ("fedclip_secure", "cli")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert len(quoted) > 10
    assert [parts for parts in quoted if not parts or any(part not in said for part in parts)] == []


def test_the_unit_files_start_the_programs_and_give_up_no_safeguard() -> None:
    units = [block.text for block in blocks(TUTORIAL) if block.language == "ini"]
    assert len(units) == 2
    for unit in units:
        parsed = configparser.ConfigParser(strict=False, interpolation=None)
        parsed.read_string(unit)
        service = parsed["Service"]
        assert service["ProtectSystem"] == "strict"
        assert service["NoNewPrivileges"] == "yes"
        assert service["UMask"] == "0077"
        assert service["Restart"].startswith("on-")


def test_the_table_of_thresholds_is_what_the_silos_compute() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", THREAT_MODEL.read_text(), re.M)
    assert [int(row[0]) for row in rows] == [3, 4, 5, 6, 7, 10, 20, 50, 255]
    for n, t, absent, t_curious, floor_curious, absent_curious in (tuple(map(int, row)) for row in rows):
        assert (t, absent) == (threshold(n, "malicious", 1), n - max(t, 3))
        assert t_curious == threshold(n, "honest_but_curious", 1)
        assert floor_curious == max(t_curious, 3)
        assert absent_curious == n - floor_curious


def _anchors(page: Path) -> set[str]:
    """Headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
