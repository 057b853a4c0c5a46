"""Tokenizers of Hugging Face from a folder, from the hub's cache, and pinned; the real ones, small and made here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract, FederationLock, OpenClipEncoder
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.data.dataset import Task
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.features.checkpoint import register
from fedclip_secure.training.inputs import load_with_task
from fedclip_secure.training.prepare import prepare

WORDS = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person", "a", "picture", "of", "photo")
HUB = "someone/words"


def write_tokenizer(folder: Path, words: tuple[str, ...] = WORDS) -> Path:
    """A tokenizer with a token for each of `words`, in this order, as `save_pretrained` writes it."""
    known = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *words))}
    made = Tokenizer(WordLevel(known, unk_token="[UNK]"))  # noqa: S106 - of words
    made.pre_tokenizer = Whitespace()
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **marks).save_pretrained(folder)
    return folder


@pytest.fixture
def home(random_tower: Path, tmp_path: Path) -> Path:
    """A coordinator's folder: the random tower, whose config names a tokenizer of the hub."""
    folder = Path(shutil.copytree(random_tower, tmp_path / "home"))
    config = json.loads((folder / "tower.json").read_text())
    config["text_cfg"] |= {"hf_tokenizer_name": HUB, "tokenizer_kwargs": {"clean": "whitespace"}}
    (folder / "tower.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine, empty, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def plan_with(plan: FederationPlan, tokenizer: str | None) -> FederationPlan:
    data = plan.model_dump(mode="json")
    own = {} if tokenizer is None else {"tokenizer": tokenizer}
    return check({**data, "model": {**data["model"], **own}}, FederationPlan, "plan")


def agreed(plan: FederationPlan, home: Path) -> Contract:
    return Contract(plan, prepare(plan, home).lock)


def at_silo(contract: Contract, home: Path, tokenizer: Path | None) -> Task:
    silo = SiloConfig.model_validate(
        {"name": "lab", "data": {"format": "folder", "path": "images"}, "device": "cpu"}
        | {"weights": str(home / "tower.safetensors"), "tokenizer": None if tokenizer is None else str(tokenizer)}
    )
    return load_with_task(silo, contract)[1]


def pin_of(contract: Contract) -> str | None:
    assert isinstance(contract.lock.encoder, OpenClipEncoder)
    return contract.lock.encoder.tokens_sha256


def test_a_folder_serves_coordinator_and_silo_in_place_of_a_download(
    home: Path, tmp_path: Path, tower_plan: FederationPlan
) -> None:
    write_tokenizer(home / "words")
    contract = agreed(plan_with(tower_plan, "words"), home)
    mine = write_tokenizer(tmp_path / "copy")
    assert at_silo(contract, home, mine).text_features.shape == (7, 64)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # another writing of the same is the same tokenizer
        (mine / name).write_text(json.dumps(json.loads((mine / name).read_text()), indent=7))
    at_silo(contract, home, mine)


def test_another_vocabulary_is_refused_and_both_hashes_are_told(
    home: Path, tmp_path: Path, tower_plan: FederationPlan
) -> None:
    write_tokenizer(home / "words")
    contract = agreed(plan_with(tower_plan, "words"), home)
    other = write_tokenizer(tmp_path / "other", WORDS[::-1])
    with pytest.raises(ModelError) as refused:
        at_silo(contract, home, other)
    said = str(refused.value)
    assert "the tokenizer of tower makes other tokens here than at the coordinator\n" in said
    assert f"SHA-256 lock: {pin_of(contract)}\n" in said
    assert "set `tokenizer: PATH` in silo.yaml" in said


def test_vocabularies_that_agree_on_the_plans_words_are_told_apart(
    home: Path, tmp_path: Path, tower_plan: FederationPlan
) -> None:
    write_tokenizer(home / "words")
    contract = agreed(plan_with(tower_plan, "words"), home)
    longer = write_tokenizer(tmp_path / "longer", (*WORDS, "left", "lung"))
    with pytest.raises(ModelError, match="makes other tokens here"):
        at_silo(contract, home, longer)


def test_a_silo_without_a_copy_of_the_coordinators_own_folder_is_told_so(
    home: Path, tower_plan: FederationPlan
) -> None:
    write_tokenizer(home / "words")
    contract = agreed(plan_with(tower_plan, "words"), home)
    with pytest.raises(
        ModelError, match=r"the coordinator's own folder 'words', .* set `tokenizer: PATH` in silo\.yaml"
    ):
        at_silo(contract, home, None)


def snapshot_in(hub: Path) -> Path:
    """The folder of a repository's files in the hub's cache."""
    repository = hub / "models--someone--words"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    return repository / "snapshots" / ("a" * 40)


def test_the_hubs_cache_is_enough_and_is_pinned_too(home: Path, hub: Path, tower_plan: FederationPlan) -> None:
    write_tokenizer(snapshot_in(hub))
    contract = agreed(plan_with(tower_plan, None), home)
    assert pin_of(contract) is not None
    at_silo(contract, home, None)
    with pytest.raises(ModelError, match="makes other tokens here"):
        at_silo(contract, home, write_tokenizer(home / "other", WORDS[::-1]))


def test_a_text_tower_of_the_hub_is_built_from_the_cache_and_named_where_it_is_not_there(
    home: Path, hub: Path, tower_plan: FederationPlan
) -> None:
    config = json.loads((home / "tower.json").read_text())
    towers = {"hf_model_name": HUB, "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler", "context_length": 16}
    config["text_cfg"] = towers | {"hf_tokenizer_name": HUB}
    (home / "tower.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"the config of the text tower of tower\.json cannot be .*/main/config\.json"):
        agreed(plan_with(tower_plan, None), home)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    snapshot = write_tokenizer(snapshot_in(hub))
    (snapshot / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 40, **sizes}))
    config["text_cfg"]["hf_model_name"] = str(snapshot)
    network = open_clip.create_model(register(config), pretrained_text=False)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, home / "tower.safetensors")
    contract = agreed(plan_with(tower_plan, None), home)
    assert at_silo(contract, home, None).text_features.shape == (7, 64)


def test_without_network_and_cache_the_address_the_place_and_the_remedy_are_told(
    home: Path, hub: Path, tower_plan: FederationPlan
) -> None:
    with pytest.raises(ModelError) as refused:
        agreed(plan_with(tower_plan, None), home)
    said = str(refused.value)
    assert said.startswith("the tokenizer of tower cannot be downloaded (")
    assert "https://huggingface.co/someone/words/resolve/main/tokenizer_config.json would lie in " in said
    assert str(hub / "models--someone--words") in said
    assert "`model.tokenizer` in federation.yaml, `tokenizer` in silo.yaml" in said


@pytest.mark.parametrize(("content", "error"), [(None, ConfigError), ("{", ModelError)])
def test_a_folder_that_holds_no_tokenizer_is_named(
    home: Path, tower_plan: FederationPlan, content: str | None, error: type[Exception]
) -> None:
    if content is not None:
        write_tokenizer(home / "words")
        (home / "words" / "tokenizer.json").write_text(content)
    with pytest.raises(error, match=r"home/words.: (is no folder|holds no tokenizer that can be read)"):
        agreed(plan_with(tower_plan, "words"), home)


def test_a_folders_own_code_is_never_run(home: Path, tmp_path: Path, tower_plan: FederationPlan) -> None:
    about = write_tokenizer(home / "words") / "tokenizer_config.json"
    (home / "words" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    code = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    about.write_text(json.dumps(json.loads(about.read_text()) | code))
    with pytest.raises(ModelError, match="holds no tokenizer that can be read"):
        agreed(plan_with(tower_plan, "words"), home)
    assert not (tmp_path / "ran").exists()


def test_missing_transformers_is_told_with_what_needs_it(
    home: Path, tower_plan: FederationPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokenizer(home / "words")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r'tokenizer of tower: the package .* -m pip install "transformers>=5"`'):
        agreed(plan_with(tower_plan, "words"), home)


def test_clips_own_tokenizer_is_pinned_and_a_lock_of_version_0_1_is_read_without(
    random_tower: Path, tower_plan: FederationPlan
) -> None:
    contract = agreed(tower_plan, random_tower)
    before = at_silo(contract, random_tower, None)
    data = contract.lock.model_dump(mode="json")
    assert len(data["encoder"].pop("tokens_sha256")) == 64
    old = Contract(tower_plan, check(data, FederationLock, "lock"))
    assert old.lock.model_dump(mode="json") == data, "and so its digest is what it was"
    assert np.array_equal(at_silo(old, random_tower, None).text_features, before.text_features)
    data["encoder"]["tokens_sha256"] = "0" * 64
    with pytest.raises(ModelError, match="install the versions of open_clip_torch, ftfy and transformers that it has"):
        at_silo(Contract(tower_plan, check(data, FederationLock, "lock")), random_tower, None)


def test_a_lock_of_version_0_1_does_not_pin_a_tokenizer_of_the_hub_and_that_is_said(
    home: Path, tower_plan: FederationPlan, caplog: pytest.LogCaptureFixture
) -> None:
    write_tokenizer(home / "words")
    plan = plan_with(tower_plan, "words")
    data = agreed(plan, home).lock.model_dump(mode="json")
    del data["encoder"]["tokens_sha256"]
    at_silo(Contract(plan, check(data, FederationLock, "lock")), home, home / "words")
    assert "version 0.1 and does not pin the tokenizer" in caplog.text
