from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fedclip_secure.config.fields import read_model
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.demo.scene import Options, check_data, set_scene, write_plan
from fedclip_secure.errors import ConfigError


def sites(folder: Path, *names: str, lacking: str = "") -> Path:
    for name in names:
        for kind in ("cat", "big_dog"):
            (folder / name / kind).mkdir(parents=True)
            if (name, kind) != (lacking, "cat"):
                Image.new("RGB", (8, 8)).save(folder / name / kind / "1.png")
    return folder


def test_folders_of_one_s_own_become_sites_and_classes(tmp_path: Path) -> None:
    data = sites(tmp_path / "data", "A_b", "c", "d", "e", lacking="c")
    scene = set_scene(Options(out=tmp_path, data=data, unseen="e"))
    assert [site.silo for site in scene.training] == ["a-b", "c", "d"]
    assert scene.unseen is not None
    assert scene.unseen.name == "e"
    assert scene.classes == {"big_dog": "big dog", "cat": "cat"}
    assert scene.absent(scene.training[1]) == ["cat"]


def test_without_an_unseen_site_all_train(tmp_path: Path) -> None:
    scene = set_scene(Options(out=tmp_path, data=sites(tmp_path / "data", "a", "b", "c")))
    assert (len(scene.training), scene.unseen) == (3, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unseen": "x"}, "--unseen x: there is no such site; .* holds a, b, c"),
        ({"unseen": "a"}, "2 site.s. .* would train; 3 are needed"),
        ({"kill_one": True}, "3 site.s. .* would train; 4 are needed to kill one"),
        ({"silos": 4}, "3 site.s. .* would train; 4 are needed"),
    ],
)
def test_too_few_sites_are_told(tmp_path: Path, options: dict[str, object], message: str) -> None:
    data = sites(tmp_path / "data", "a", "b", "c")
    with pytest.raises(ConfigError, match=message):
        set_scene(Options(out=tmp_path, data=data, **options))  # type: ignore[arg-type]


def test_sites_whose_names_would_be_one_in_a_certificate_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same name in a certificate"):
        set_scene(Options(out=tmp_path, data=sites(tmp_path / "data", "a b", "a_b", "c")))


@pytest.mark.parametrize("layout", ["nothing", "missing"])
def test_data_that_holds_no_sites_is_told(tmp_path: Path, layout: str) -> None:
    if layout == "nothing":
        (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match=r"data: (holds no DIR/<site>/<class>/|is not a folder)"):
        set_scene(Options(out=tmp_path, data=tmp_path / "data"))


def test_the_plan_of_the_demo_is_a_plan(tmp_path: Path) -> None:
    options = Options(out=tmp_path, data=sites(tmp_path / "data", "a", "b", "c"), rounds=3, method="linear_probe")
    write_plan(tmp_path / "federation.yaml", set_scene(options), options, "https://localhost:8443")
    plan = read_model(tmp_path / "federation.yaml", FederationPlan)
    assert (plan.training.rounds, plan.method.name, plan.model.name) == (3, "linear_probe", "fedclip-tiny")


def test_output_inside_the_data_would_become_a_site(tmp_path: Path) -> None:
    data = sites(tmp_path / "data", "a", "b", "c")
    with pytest.raises(ConfigError, match="lies inside --data"):
        check_data(Options(out=data / "out", data=data))


def test_an_unknown_drawn_lab_is_told_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--unseen x: the drawn labs are birch, cedar"):
        check_data(Options(out=tmp_path / "out", unseen="x"))
    assert not (tmp_path / "out").exists()


def test_a_site_s_name_in_another_script_gets_one_that_certificates_take(tmp_path: Path) -> None:
    scene = set_scene(Options(out=tmp_path, data=sites(tmp_path / "data", "東京", "b", "c")))
    assert [site.silo.startswith("site-") for site in scene.training] == [False, False, True]


@pytest.mark.parametrize("name", ["a\nb", "aggregator"])
def test_names_that_cannot_be_are_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="holds control characters or is 'aggregator'"):
        set_scene(Options(out=tmp_path, data=sites(tmp_path / "data", name, "b", "c")))
