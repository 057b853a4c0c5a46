"""Exported folders and their cards, made of real locks."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image
from safetensors.numpy import save_file

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.config.silo import FolderData, SiloConfig
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.data.embeddings import read_text_features
from fedclip_secure.errors import DataError
from fedclip_secure.export.adapter_facts import KEPT_HOME, Facts, make_card, read_facts, write_card
from fedclip_secure.export.card import model_card
from fedclip_secure.export.examples import EXAMPLES, EXTERNAL, IMAGE_FEATURES, TEXT_FEATURES
from fedclip_secure.export.folder import write_export
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.accounting.accountant import epsilon
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.training.evaluation.evaluate import batches, predictor
from fedclip_secure.training.evaluation.predict import predict
from fedclip_secure.training.local_training import LocalTrainer
from fedclip_secure.training.prepare import prepare
from tests.config.test_lock import LOCK, contract
from tests.config.test_plan import PLAN, plan_with
from tests.waiting import BOUND

CPU = torch.device("cpu")
ROSTER = Roster.of(
    {n: Ed25519PrivateKey.generate().public_key().public_bytes_raw() for n in ("a", "b", "c", "aggregator")}
)
FACTS = Facts("last", 50, bytes(range(32)), 90, 120)
PERSONAL = {"of": "00" * 32, "share": 0.5, "epoch": 3, "batch_size": 32, "optimizer": {"name": "adam", "lr": 1e-3}}


ONCE = {"rounds": 1, "batch_size": 1, "optimizer": {"name": "sgd", "lr": 1.0}}


def plan_for(
    model: dict[str, Any], method: str = "fedclip", options: Mapping[str, Any] = MappingProxyType({})
) -> FederationPlan:
    changes = {"model": model, "method": {"name": method, **options}, "classes": {"round": "a | disc", "long": "a rod"},
               "templates": ["a micrograph of {}", "{}"], "initial": None, "secure_aggregation": {}}  # fmt: skip
    if method in {"private_prototypes", "discriminant"}:
        changes |= {"training": ONCE, "secure_aggregation": {"coordinate_clip": 10_000.0, "weights": "equal"}}
    return check({**PLAN, **changes}, FederationPlan, "plan")


def prepared(plan: FederationPlan, home: Path, moved: float = 0.02) -> tuple[Contract, AdapterState]:
    """The contract, and an adapter that is not the one that it starts from."""
    made = prepare(plan, home)
    layout = Layout(tuple((entry.name, tuple(entry.shape)) for entry in made.lock.layout))
    start = AdapterState.from_safetensors(made.initial_file, layout, "initial")
    vector = start.vector + moved * np.sin(np.arange(layout.size))
    return Contract(plan, made.lock), AdapterState(layout, vector.astype(np.float32))


def exported(folder: Path, agreed: Contract, state: AdapterState, text_features: Path | None = None) -> list[str]:
    files = write_export(folder, state, replace(FACTS, model=state.digest), agreed, ROSTER, text_features=text_features)
    assert sorted(files) == sorted(folder.iterdir())
    return [file.name for file in files]


def ran(folder: Path, *arguments: Path) -> list[list[str]]:
    """What the program in the card prints where this package cannot be imported; the words of each line."""
    blocked = f"import sys; sys.modules['fedclip_secure'] = None\n{program((folder / 'README.md').read_text('utf-8'))}"
    command = [sys.executable, "-I", "-c", blocked, *map(str, arguments)]
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def program(card: str) -> str:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]  # type: ignore[no-any-return]


def test_the_shipped_encoder_travels_with_the_adapter_and_the_program_runs_as_it_is(tmp_path: Path) -> None:
    agreed, state = prepared(plan_for({"name": "fedclip-tiny", "pretrained": "shipped"}), tmp_path)
    names = exported(tmp_path / "out", agreed, state)
    assert names == ["adapter.safetensors", "adapter.json", "README.md", "encoder.json", "fedclip-tiny.safetensors"]
    weights = (tmp_path / "out" / "fedclip-tiny.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == agreed.lock.encoder.model_dump()["weights_sha256"]
    images = []
    for number, pixels in enumerate(np.random.default_rng(1).integers(0, 256, (4, 90, 70, 3), dtype=np.uint8)):
        images.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels // (number + 1)).save(images[-1])
    data = FolderData(format="folder", path=str(tmp_path))
    silo = SiloConfig(name="lab", data=data, workdir=str(tmp_path / "work"), device="cpu")
    wanted = predict(silo, agreed, state, images, lambda _: None)
    labels = wanted.probabilities.argmax(axis=1)
    found = ran(tmp_path / "out", *images)
    assert [line[:2] for line in found] == [[str(p), wanted.classes[i]] for p, i in zip(images, labels, strict=True)]
    assert [float(line[2]) for line in found] == pytest.approx(wanted.probabilities.max(axis=1), abs=1e-4)


@pytest.mark.parametrize("method", ["fedclip", "discriminant", "feddat"])
def test_features_of_an_encoder_of_the_silos_own_are_classified_too(method: str, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    text = {"text_features": random.normal(size=(2, 8)).astype(np.float32), "logit_scale": np.array(20.0, np.float32)}
    save_file(text, tmp_path / "prompts.safetensors", {"classes": '["long", "round"]'})  # not the plan's order
    model = {"name": "external", "dim": 8, "text_features": "prompts.safetensors"}
    agreed, start = prepared(plan_for(model, method), tmp_path)
    features, ids = random.normal(size=(40, 8)).astype(np.float32), np.zeros((40, 32), dtype=np.uint8)
    save_file({"features": features}, tmp_path / "mine.safetensors")
    task = Task(("round", "long"), *read_text_features(tmp_path / "prompts.safetensors", ("round", "long"), 8))
    records = FeatureSet(features, np.arange(40) % 2, ids, "mine")
    update = LocalTrainer(agreed.plan, task, {"train": records, "validation": records}, CPU).train(start)
    state = AdapterState(start.layout, (start.vector + update).astype(np.float32))
    names = exported(tmp_path / "out", agreed, state, tmp_path / "prompts.safetensors")
    assert names == ["adapter.safetensors", "adapter.json", "README.md", "text_features.safetensors"]
    logits = predictor(agreed.plan, task, state, CPU)
    with torch.no_grad():
        shares = torch.softmax(logits(next(iter(batches(records, task, CPU)))), dim=-1)
    found = ran(tmp_path / "out", tmp_path / "mine.safetensors")
    assert [line[0] for line in found] == [task.classes[int(label)] for label in shares.argmax(dim=-1)]
    assert {line[0] for line in found} == {"round", "long"}
    assert [float(line[1]) for line in found] == pytest.approx(shares.max(dim=-1).values.tolist(), abs=1e-4)


def test_other_text_features_than_the_locked_ones_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    text = {"text_features": np.eye(2, 8, dtype=np.float32), "logit_scale": np.array(20.0, np.float32)}
    save_file(text, tmp_path / "prompts.safetensors", {"classes": '["long", "round"]'})
    agreed, state = prepared(plan_for({"name": "external", "dim": 8, "text_features": "prompts.safetensors"}), tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"other")
    for path in (tmp_path / "other.safetensors", tmp_path / "absent.safetensors"):
        with pytest.raises(
            DataError, match=r"is not the file of text features that the lock names.*copy it here again"
        ):
            exported(tmp_path / "out", agreed, state, path)
    assert not (tmp_path / "out").exists()


def test_card_holds_the_facts_of_plan_lock_roster_and_run() -> None:
    card = model_card(FACTS, contract(), ROSTER)
    for fact in (
        "# lung-xray: last adapter, after round 50 of 50",
        "| silos | 3, at least 3 of them in a round; each weighs as the plan lists it |",
        "| method | fedclip, loss cross_entropy |",
        "batches of 32, adam, lr 5e-05, betas [0.9, 0.98], eps 1e-06, weight_decay 0.02",
        "| validation | 90 of 120 records right (75.0 %), of all silos of the round after it |",
        "| parameters | 7 float32: w (2 x 3), b () |",
        f"| encoder | ViT-B-32, 512 features; weights SHA-256 {'2' * 64} |",
        f"| adapter digest | {FACTS.model.hex()} |",
        contract().pin,
        ROSTER.pin,
        "| covid | a chest x-ray showing COVID-19; COVID-19 |",
        "None: no epsilon bounds it, and whoever has this adapter may learn about the training records from it.",
        "must have been mapped from [0, 4095] to 0..255",
    ):
        assert fact in card, fact


def test_a_bar_in_a_phrase_does_not_end_the_cell(tmp_path: Path) -> None:
    agreed, _ = prepared(plan_for({"name": "fedclip-tiny", "pretrained": "shipped"}), tmp_path)
    assert "| round | a micrograph of a \\| disc; a \\| disc |" in model_card(FACTS, agreed, ROSTER)


def test_card_of_a_model_that_nobody_counted_for_says_so() -> None:
    card = model_card(replace(FACTS, correct=0, total=0), contract(), ROSTER)
    assert "| validation | nobody counted |" in card
    assert "nobody counted validation records" in card


def test_card_of_a_private_plan_states_its_privacy() -> None:
    plan = {**PLAN, "splits": {"train": 0.8, "validation": 0.0, "test": 0.2}, "privacy": {
        "unit": "patient", "sample_rate": 0.1, "steps_per_round": 5, "noise_multiplier": 1.5, "max_grad_norm": 0.5,
        "update_divisor": 64.0, "delta": 1e-5}}  # fmt: skip
    plan["training"] = {
        key: value for key, value in PLAN["training"].items() if key not in ("batch_size", "local_epochs")
    }
    agreed = contract(plan, {**LOCK, "noise_multiplier": 1.5})
    spent = epsilon([Event(1.5, 0.1, 250)], 1e-5)
    assert 1 < spent < 10
    card, facts = model_card(FACTS, agreed, ROSTER), make_card(FACTS, agreed, ROSTER)
    said = (
        f"psilon = {spent:.4f} at delta = 1e-05 for adding or removing any one patient of one silo's training records"
    )
    for text in (card, facts["privacy"]):
        assert f"{said}, for all 50 round(s) that the plan allows, retrains included" in text
        assert re.search(r"computed by fedclip-secure [\w.]+ from plan and lock, by PLD", text)
    assert {key: facts["claim"][key] for key in ("epsilon", "delta", "unit", "rounds")} == {
        "epsilon": spent, "delta": 1e-5, "unit": "patient", "rounds": 50}  # fmt: skip
    row = f"| epsilon | {spent:.4f} at delta 1e-05 for each patient, over all 50 round(s) that the plan allows"
    assert row in card
    assert "| epsilon |" not in model_card(replace(FACTS, personal=PERSONAL), agreed, ROSTER)
    assert "| epsilon |" not in model_card(FACTS, contract(PLAN, LOCK), ROSTER)
    assert "each patient in one with chance 0.1" in card
    assert "nothing bounds what it tells about them" not in card
    personal = make_card(replace(FACTS, personal=PERSONAL), agreed, ROSTER)
    assert personal["claim"] is None
    assert personal["privacy"] == KEPT_HOME


def test_card_of_a_plan_that_nothing_can_be_claimed_of_says_so() -> None:
    plan = {**PLAN, "splits": {"train": 0.8, "validation": 0.0, "test": 0.2}, "privacy": {
        "unit": "record", "sample_rate": 1.0, "steps_per_round": 500, "noise_multiplier": 0.01, "max_grad_norm": 0.5,
        "update_divisor": 64.0, "delta": 1e-5}}  # fmt: skip
    plan["training"] = {"rounds": 50, "optimizer": {"lr": 1e-3}}
    for lock in ({**LOCK, "noise_multiplier": 0.01}, {**LOCK, "noise_multiplier": 5.0, "releases": 2}, LOCK):
        agreed = contract(plan, lock)
        card, facts = model_card(FACTS, agreed, ROSTER), make_card(FACTS, agreed, ROSTER)
        assert "No epsilon can be claimed" in card
        assert "nothing bounds what it tells about them" in card
        assert facts["claim"] is None
        assert facts["privacy"].startswith("no epsilon can be claimed")


def test_personal_adapter_is_told_from_the_global_one() -> None:
    personal = replace(FACTS, kind="personal", scope="this silo alone, which chose by them", personal=PERSONAL)
    card = model_card(personal, contract(), ROSTER)
    assert f"**This is one silo's own adapter**, {KEPT_HOME}." in card
    assert "share 0.5, epoch 3, batch_size 32, optimizer (adam, lr 0.001) |" in card
    assert make_card(personal, contract(), ROSTER)["privacy"] == KEPT_HOME
    assert "no epsilon bounds what it tells about them" in KEPT_HOME
    unchanged = replace(personal, personal={**PERSONAL, "share": 0.0})
    assert KEPT_HOME in model_card(unchanged, contract(), ROSTER), "its records were counted, and chose"
    assert unchanged.warning() == {"personal": KEPT_HOME}


@pytest.mark.parametrize("bad", ["![x](http://t/a.png)", "[x](http://t)", "<script>x</script>", "`a` | b", "[x][y]"])
def test_names_of_a_plan_are_text_in_the_card(bad: str) -> None:
    plan = {**PLAN, "classes": {"normal": bad, "covid": "COVID-19"}, "templates": [f"{{}} {bad}"]}
    card = model_card(FACTS, contract(plan), ROSTER)
    table = card.partition("## Classes")[2].partition("## Load it")[0]
    assert not re.search(r"(?<!\\)(\]\(|\]\[|[<>`])", table)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table.strip().splitlines())


@pytest.mark.parametrize("personal", [None, PERSONAL])
def test_facts_are_read_as_they_were_written(tmp_path: Path, personal: dict[str, Any] | None) -> None:
    state = AdapterState(Layout((("w", (2,)),)), np.array([1.0, 2.0], dtype=np.float32))
    facts = replace(FACTS, model=state.digest, personal=personal)
    write_card(tmp_path / "best.json", facts, contract(), ROSTER)
    assert read_facts(tmp_path / "best.safetensors", state) == facts


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"model_digest": 5}', '"x"'])
def test_a_damaged_card_is_named(tmp_path: Path, text: str) -> None:
    state = AdapterState(Layout((("w", (2,)),)), np.array([1.0, 2.0], dtype=np.float32))
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(DataError, match=r"best\.json': (cannot be read as an adapter's card|is the card of another)"):
        read_facts(tmp_path / "best.safetensors", state)


def test_a_personal_card_without_its_share_is_damaged(tmp_path: Path) -> None:
    state = AdapterState(Layout((("w", (2,)),)), np.array([1.0, 2.0], dtype=np.float32))
    card = {"model_digest": state.digest.hex(), "after_round": 3, "personal": {"epoch": 3}}
    (tmp_path / "personal.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match="`fedclip-silo personalize` writes it anew"):
        read_facts(tmp_path / "personal.safetensors", state)


@pytest.mark.parametrize("method", sorted(EXAMPLES))
def test_every_program_is_python_without_this_package_whatever_the_encoder(method: str) -> None:
    external = {"kind": "external", "dim": 8, "text_features_sha256": "5" * 64, "logit_scale": 10.0}
    own = {**plan_with("model", {"name": "external", "dim": 8, "text_features": "x.npz"}), "method": {"name": method}}
    for agreed in (contract({**PLAN, "method": {"name": method}}), contract(own, {**LOCK, "encoder": external})):
        text = program(model_card(FACTS, agreed, ROSTER))
        ast.parse(text)
        assert "fedclip_secure" not in text
    assert IMAGE_FEATURES in EXAMPLES[method]
    assert set(EXTERNAL) == {IMAGE_FEATURES, TEXT_FEATURES}


def test_built_in_encoder_is_loaded_by_its_name_and_tag() -> None:
    agreed = contract(plan_with("model", {"name": "ViT-B-32", "pretrained": "openai"}))
    text = program(model_card(FACTS, agreed, ROSTER))
    assert 'open_clip.create_model("ViT-B-32", pretrained="openai")' in text
    assert "encoder.json" not in text


def test_a_name_that_the_coordinator_chose_does_not_become_code() -> None:
    name = 'x"); print("owned'
    text = program(model_card(FACTS, contract(plan_with("model", {"name": "ViT-B-32", "pretrained": name})), ROSTER))
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) and node.value == name]
    assert len(calls) == 1


def test_a_method_without_a_program_is_sent_to_predict() -> None:
    card = model_card(FACTS, contract(plan_with("method.name", "another")), ROSTER)
    assert "`fedclip-silo predict`; the equations stand in its package `fedclip_secure.methods`" in card
    assert "```" not in card
