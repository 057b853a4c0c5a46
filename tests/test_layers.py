"""The layers of the architecture, read from the imports; and what a coordinator's process must never load."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import BOUND

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fedclip_secure"
LAYERS = {
    0: ("errors", "canonical", "disk", "extras", "files", "names"),
    1: ("config", "data", "model", "pki"),
    2: ("features", "secagg", "privacy"),
    3: ("export", "methods", "transport"),
    4: ("training", "aggregator"),
    5: ("audit", "silo"),
    6: ("demo", "simulate"),
}
LEVEL = {part: level for level, parts in LAYERS.items() for part in parts}
# Within a part: each room, or module beside the rooms, imports only those that stand before it.
ROOMS = {
    "privacy": ("canonical_json", "accounting", "ledger", "report", "verification", "page"),
    "training": (
        "device_records", "shared_parameters", "silo_data", "unshared_state", "inputs", "evaluation", "local_training",
        "private", "personalize", "prepare",
    ),
    "silo": ("policy", "receipts", "accepted", "run", "adapters", "export", "personal_adapter", "report"),
}  # fmt: skip
MOST_DOORS = 18  # modules in one folder: more are a hall
FORBIDDEN = {"aggregator": {"features", "methods", "training"}, "silo": {"aggregator"}}
# A generator that is not the system's, and where it may stand: it decides no noise, mask or key there.
GENERATORS = {
    "transport/client.py": "jitter between two tries",
    "data/drawn/drawings.py": "the demo's pictures",
    "data/drawn/staining.py": "the demo's pictures",
    "data/drawn/labs.py": "the demo's pictures",
    "methods/fedapt.py": "the domains' public keys, which the plan's seed decides",
    "export/encoder_examples.py": "the same keys, in the text of an exported program",
    "simulate/partition.py": "which simulated silo holds which record",
}


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _part(path: Path) -> str:
    """The package or level-0 module that a file belongs to; "" for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def _imports(tree: ast.AST) -> set[str]:
    """Full names of all that is imported, at the top or in a function, for types alone or not."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _imported_parts(path: Path) -> set[str]:
    names = _imports(ast.parse(path.read_text("utf-8")))
    return {name.split(".")[1] for name in names if name.startswith("fedclip_secure.")}


def test_every_part_of_the_package_has_a_layer() -> None:
    resources = {"assets"}  # no code
    parts = {_part(path) for path in _modules()} - {""} - resources
    assert parts <= set(LEVEL), f"give {parts - set(LEVEL)} a layer in ARCHITECTURE.md and here"
    assert {"config", "pki", "secagg", "silo", "aggregator"} <= parts, "the walk found too little"


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_lower_layers_and_its_own_package(path: Path) -> None:
    here = _part(path)
    level = LEVEL.get(here, 0)
    wrong = {part for part in _imported_parts(path) if part != here and LEVEL[part] >= level > 0}
    if level == 0:  # of these, only errors may be used by the others, and names by anything
        wrong = {part for part in _imported_parts(path) if LEVEL[part] > 0}
    assert not wrong, f"{here} (layer {level}) imports {sorted(wrong)}"


@pytest.mark.parametrize("part", sorted(ROOMS))
def test_room_imports_only_rooms_before_it(part: str) -> None:
    rooms, folder = ROOMS[part], PACKAGE / part
    there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__"} == set(rooms), f"give each room of {part}/ its place in ROOMS"
    for path in folder.rglob("*.py"):
        here = path.relative_to(folder).parts[0].removesuffix(".py")
        names = [name.split(".") for name in _imports(ast.parse(path.read_text("utf-8")))]
        used = {name[2] for name in names if name[:2] == ["fedclip_secure", part]} - {here}
        assert used <= set(rooms[: rooms.index(here)]) if here in rooms else not used, f"{path} imports {used}"


def test_no_folder_is_a_hall() -> None:
    folders = {path.parent for path in [*_modules(), *(ROOT / "cli").rglob("*.py")]}
    doors = {folder: sum(path.stem != "__init__" for path in folder.glob("*.py")) for folder in folders}
    assert {folder: count for folder, count in doors.items() if count > MOST_DOORS} == {}


@pytest.mark.parametrize("part", sorted(FORBIDDEN))
def test_part_never_imports_what_it_must_not_know(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        assert not _imported_parts(path) & FORBIDDEN[part], path


def test_nothing_in_the_library_imports_the_command_line() -> None:
    for path in _modules():
        assert not any(name.split(".")[0] == "fedclip_cli" for name in _imports(ast.parse(path.read_text("utf-8"))))


def test_the_secure_rounds_do_no_io() -> None:
    outside = {"socket", "sqlite3", "aiohttp", "asyncio", "time", "datetime", "pathlib", "torch", "tempfile", "ssl"}
    for path in (PACKAGE / "secagg").rglob("*.py"):
        names = {name.split(".")[0] for name in _imports(ast.parse(path.read_text("utf-8")))}
        assert not names & outside, f"{path} imports {names & outside}"


@pytest.mark.parametrize(
    "modules",
    [
        "fedclip_secure.aggregator",
        "fedclip_secure.secagg",
        "fedclip_secure.privacy",
        "fedclip_cli.agg",
        "fedclip_cli.silo fedclip_cli.privacy fedclip_secure.silo",
    ],
)
def test_importing_loads_no_torch(modules: str) -> None:
    names = [name for root in modules.split() for name in _with_submodules(root)]
    assert not _loaded(names) & {"torch", "opacus"}


@pytest.mark.parametrize(
    "modules",
    [
        ["fedclip_secure.aggregator.serve", "fedclip_cli.agg"],
        ["fedclip_secure.silo.run.train", "fedclip_cli.silo", "fedclip_cli.privacy"],
    ],
    ids=["serve", "train"],
)
def test_what_must_start_fast_loads_neither_scipy_nor_matplotlib(modules: list[str]) -> None:
    assert not _loaded(modules) & {"scipy", "dp_accounting", "matplotlib", "torch"}


def _loaded(modules: list[str]) -> set[str]:
    """What a new process has loaded after it has imported these."""
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *modules],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=BOUND,
    )
    return set(done.stdout.split())


def _with_submodules(name: str) -> list[str]:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    folder = Path(spec.origin or "").parent if spec.submodule_search_locations else None
    inner = sorted(path.relative_to(folder) for path in folder.rglob("*.py")) if folder else []
    parts = [path.with_suffix("").parts for path in inner if path.stem != "__init__"]
    return [name, *(".".join((name, *each)) for each in parts)]


def test_nothing_is_ever_unpickled() -> None:
    pattern = re.compile(r"\bpickle\.|import pickle|torch\.load\(|allow_pickle=True|joblib|\bdill\b")
    for path in _modules():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if pattern.search(line) and "weights_only=True" not in line:
                raise AssertionError(f"{path}:{number}: {line.strip()}")


def test_generators_that_are_not_the_systems_stand_only_where_a_reason_does() -> None:
    for path in _modules():
        names = _imports(ast.parse(path.read_text("utf-8")))
        used = {name for name in names if name == "random" or name.startswith("random.")}
        text = path.read_text("utf-8")
        if used or re.search(r"np\.random|numpy\.random", text):
            assert str(path.relative_to(PACKAGE)) in GENERATORS, f"{path} uses a generator that is not the system's"


@pytest.mark.parametrize("part", ["secagg", "pki", "aggregator", "silo", "transport", "privacy"])
def test_no_seeded_generator_near_masks_and_keys(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        assert not re.search(r"default_rng|manual_seed|RandomState|\.seed\(", path.read_text("utf-8")), path


def test_no_seeded_generator_near_noise_and_batches() -> None:
    found = sorted((PACKAGE / "training" / "private").glob("*.py"))
    assert {"dp_sgd.py", "gaussian.py", "poisson.py", "clipping.py"} <= {path.name for path in found}
    for path in found:
        text = path.read_text("utf-8")
        odd = r"default_rng|manual_seed|RandomState|\.seed\(|torch\.(Generator|rand|normal|bernoulli)"
        assert not re.search(odd, text), path
