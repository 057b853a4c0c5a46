from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedclip_secure.errors import ModelError
from fedclip_secure.features.checkpoint import check_file, check_tag, load_model, register, sha256_of

UNKNOWN = "0" * 64  # the digest of a file that open_clip has no address of


@pytest.fixture
def config(random_tower: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((random_tower / "tower.json").read_text())
    return found


@pytest.fixture
def weights(random_tower: Path) -> Path:
    return random_tower / "tower.safetensors"


@pytest.fixture(params=["openai.pt", "openai.safetensors"])
def openai_style(request: pytest.FixtureRequest, tmp_path: Path, weights: Path) -> Path:
    path = tmp_path / str(request.param)
    marks = {name: torch.tensor(64) for name in ("input_resolution", "context_length", "vocab_size")}
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({**load_file(weights), **marks}, path)
    return path


@pytest.fixture
def torchscript(tmp_path: Path) -> Path:
    archive = tmp_path / "archive.pt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("model/constants.pkl", "what marks a TorchScript archive")
    return archive


def test_every_tag_of_open_clip_has_a_model_that_fits_its_activation() -> None:
    for name, tag in open_clip.list_pretrained():
        config = open_clip.get_model_config(name)
        other = open_clip.get_model_config(f"{name}-quickgelu")
        if other is None or not open_clip.is_pretrained_cfg(f"{name}-quickgelu", tag):
            check_tag(name, tag, config)
            continue
        check_tag(f"{name}-quickgelu", tag, other)
        with pytest.raises(ModelError, match=f"set `model.name: {name}-quickgelu`"):
            check_tag(name, tag, config)


def test_openai_tag_in_a_gelu_model_is_refused_with_the_right_name() -> None:
    with pytest.raises(ModelError, match=r"trained with QuickGELU.*ViT-B-32 computes GELU.*ViT-B-32-quickgelu"):
        check_tag("ViT-B-32", "openai", open_clip.get_model_config("ViT-B-32"))


def test_gelu_tag_in_a_quickgelu_config_is_refused() -> None:
    config = {**open_clip.get_model_config("ViT-B-32"), "quick_gelu": True}
    with pytest.raises(ModelError, match=r'trained with GELU.*"quick_gelu": false'):
        check_tag("ViT-B-32", "laion2b_s34b_b79k", config)


@pytest.mark.parametrize(
    ("digest", "quick"),
    [
        ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", True),  # OpenAI's ViT-B-32.pt
        ("46683a32" + "0" * 56, True),  # vit_b_32-quickgelu-laion400m_e32-46683a32.pt
        ("af8dbd0c" + "0" * 56, False),  # vit_b_32-laion2b_e16-af8dbd0c.pth
    ],
)
def test_local_file_is_recognised_by_its_published_digest(digest: str, quick: bool, config: dict[str, Any]) -> None:
    check_file("mine", {**config, "quick_gelu": quick}, Path("local.pt"), digest)
    with pytest.raises(ModelError, match="were trained with"):
        check_file("mine", {**config, "quick_gelu": not quick}, Path("local.pt"), digest)


def test_openai_format_needs_quickgelu(config: dict[str, Any], openai_style: Path, torchscript: Path) -> None:
    for path in (openai_style, torchscript):
        check_file("mine", {**config, "quick_gelu": True}, path, UNKNOWN)
        with pytest.raises(ModelError, match="trained with QuickGELU"):
            check_file("mine", config, path, UNKNOWN)


def test_bare_state_dict_is_taken_at_the_configs_word(config: dict[str, Any], weights: Path) -> None:
    for quick in (True, False):
        check_file("mine", {**config, "quick_gelu": quick}, weights, UNKNOWN)


def test_openai_format_loads_without_its_extra_entries(
    config: dict[str, Any], openai_style: Path, weights: Path
) -> None:
    model = load_model({**config, "quick_gelu": True}, openai_style, "mine")
    assert torch.equal(model.state_dict()["visual.proj"], load_file(weights)["visual.proj"])


def test_torchscript_is_refused_as_code(config: dict[str, Any], torchscript: Path) -> None:
    with pytest.raises(ModelError, match=r"archive\.pt': is a TorchScript archive, which carries code"):
        load_model(config, torchscript, "mine")


def test_pickled_object_in_a_checkpoint_is_not_run(config: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"weights": Path("/tmp")}, tmp_path / "evil.pt")  # noqa: S108 - any object that is no tensor
    with pytest.raises(ModelError, match=r"evil\.pt: cannot be read as a checkpoint"):
        load_model(config, tmp_path / "evil.pt", "mine")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_file_that_is_no_checkpoint_is_named(
    config: dict[str, Any], tmp_path: Path, content: bytes, suffix: str
) -> None:
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"broken\.{suffix}: cannot be read as a checkpoint \([^\n]+\)$"):
        load_model(config, path, "mine")


def test_missing_and_unexpected_keys_fit_on_one_line(config: dict[str, Any], tmp_path: Path, weights: Path) -> None:
    state = load_file(weights)
    state["stranger"] = state.pop("visual.proj")
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(
        ModelError,
        match=r"^.*another model than mine: 1 missing \(first visual\.proj\); 1 unexpected \(first stranger\)$",
    ):
        load_model(config, tmp_path / "other.safetensors", "mine")


def test_other_shapes_are_named_with_the_first(config: dict[str, Any], weights: Path) -> None:
    narrow = {**config, "embed_dim": 32}
    with pytest.raises(ModelError, match=r"of another shape \(first \S+: \[.*\] in the file, \[.*\] in the model\)$"):
        load_model(narrow, weights, "mine")


def test_config_that_cannot_be_built_is_named(config: dict[str, Any], weights: Path) -> None:
    broken = {**config, "vision_cfg": {"no_such_option": 1}}
    with pytest.raises(ModelError, match=r"^mine: open_clip cannot build this model config \(.*no_such_option"):
        load_model(broken, weights, "mine")


def test_config_is_registered_under_its_own_hash(config: dict[str, Any]) -> None:
    assert register(config) == register(dict(reversed(config.items())))
    assert register(config) != register({**config, "quick_gelu": True})


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.pt': cannot be read \(No such file"):
        sha256_of(tmp_path / "gone.pt")
