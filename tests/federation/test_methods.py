"""Every method in a federation of three silos over real mutual TLS, from images to the last model at every silo."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from safetensors.numpy import load_file

from fedclip_secure.aggregator.home import freeze, init_home
from fedclip_secure.config.lock import write_lock
from fedclip_secure.config.method_recipes import RECIPES
from fedclip_secure.config.silo import FolderData, Policy, SiloConfig
from fedclip_secure.data.drawn.drawings import draw
from fedclip_secure.data.drawn.labs import LABS
from fedclip_secure.data.drawn.staining import render
from fedclip_secure.demo.settings import METHOD_NAMES, method_block, settings_of
from fedclip_secure.files import write_atomically
from fedclip_secure.methods.registry import METHODS
from fedclip_secure.silo.accepted import Accepted
from fedclip_secure.silo.run.final_models import adapter_folder
from fedclip_secure.silo.run.train import take_part
from fedclip_secure.training.prepare import prepare
from tests.aggregator.site import NAMES, Site, free_port
from tests.waiting import BOUND

SILOS = NAMES[:3]
CLASSES = {"rods": "rod-shaped bacteria", "rosettes": "rosettes of cells", "crystals": "angular crystals"}
IMAGES = 8  # of a class, at a silo
SHORT = {
    "fedclip", "linear_probe", "fedtune:text_context", "fedtune:adapter", "fedtune:visual_bias", "fedapt", "feddat",
    "feddat:blocks",
}  # fmt: skip

QUICK = {"fedclip", "private_prototypes", "discriminant", "fedapt"}


class StoppedOnPurposeError(Exception):
    """As if a person had pressed Ctrl-C."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<silo>/<class>/<number>.png`, in another look at each silo."""
    folder = tmp_path_factory.mktemp("images")
    for place, (silo, lab) in enumerate(zip(SILOS, LABS.values(), strict=False)):
        for label, kind in enumerate(CLASSES):
            (folder / silo / kind).mkdir(parents=True)
            for number in range(IMAGES):
                random = np.random.default_rng([place, label, number])
                render(draw(kind, random), lab.look, random).save(folder / silo / kind / f"{number}.png")
    return folder


@dataclass
class Silos:
    """Three silos that have accepted a plan, and their coordinator."""

    folder: Path
    images: Path
    site: Site
    accepted: Accepted

    @classmethod
    def with_method(cls, method: str, folder: Path, images: Path, tower: Path) -> Silos:
        """The demo's settings for `method`, on the random tower."""
        settings = settings_of(method)
        changes = {
            "method": method_block(method, SILOS),
            "training": {
                "rounds": min(2, settings.rounds),
                "batch_size": settings.batch_size,
                "optimizer": dict(settings.optimizer),
            },
            "secure_aggregation": {"coordinate_clip": settings.coordinate_clip, "weights": settings.weights},
        }
        return cls._of(folder, images, tower, "fedclip", changes)

    @classmethod
    def as_init_writes_it(cls, method: str, folder: Path, images: Path, tower: Path) -> Silos:
        """The plan that `init` writes for `method`, of two rounds at most, on the random tower."""
        rounds = min(2, RECIPES[method].rounds)
        named = {"method": method_block(method, SILOS)} if method == "fedapt" else {}
        return cls._of(folder, images, tower, method, {"training": {"rounds": rounds}, **named})

    @classmethod
    def _of(cls, folder: Path, images: Path, tower: Path, method: str, changes: dict[str, Any]) -> Silos:
        """`init` for `method`, then `changes` in the plan's blocks, `prepare`, enrolment and freeze."""
        port = free_port()
        home = init_home(folder / "home", "lung-xray", ["127.0.0.1"], port, method)
        for name in ("tower.json", "tower.safetensors"):
            (home.folder / name).symlink_to(tower / name)
        plan = home.plan().model_dump(mode="json")
        plan |= {
            "model": {"name": "tower", "pretrained": "tower.safetensors", "config": "tower.json"},
            "classes": CLASSES,
            "templates": ["a micrograph of {}"],
            "deadlines": dict.fromkeys(("join", "share", "upload", "agree", "unmask"), int(BOUND)),
        }
        plan |= {key: block if key == "method" else {**plan[key], **block} for key, block in changes.items()}
        home.plan_path.write_text(yaml.safe_dump(plan, sort_keys=False))
        prepared = prepare(home.plan(), home.folder)
        write_atomically(home.initial_path, prepared.initial_file)
        write_lock(home.lock_path, prepared.lock)
        site = Site(home, port)
        for name in SILOS:
            site.enrol(name)
        site.contract, roster, site.terms = freeze(site.home)
        return cls(folder, images, site, Accepted(site.contract, roster))

    def workdir(self, name: str) -> Path:
        return self.folder / name / "work"

    async def train(self, name: str, say: Callable[[str], None] = lambda _: None) -> None:
        config = SiloConfig(
            name=name,
            data=FolderData(format="folder", path=str(self.images / name)),
            identity=str(self.site.identities[name].folder),
            workdir=str(self.workdir(name)),
            weights=str(self.site.home.folder / "tower.safetensors"),
            device="cpu",
            policy=Policy(),
        )
        await take_part(
            config, self.site.identities[name], self.accepted,
            progress=lambda _: None, say=say, waiting=lambda *_: None,
        )  # fmt: skip

    def models(self, name: str) -> list[str]:
        """Digests from the initial model to the last one, on this silo's word."""
        chain = json.loads((adapter_folder(self.workdir(name)) / "models.json").read_text())
        return list(chain["models"])

    def kept(self, name: str) -> dict[str, npt.NDArray[np.float32]]:
        """What the method keeps to itself at this silo."""
        (path,) = (self.workdir(name) / "private").iterdir()
        return load_file(path)


@pytest.mark.parametrize(
    "method", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in METHOD_NAMES]
)
def test_every_round_of_a_method_makes_a_new_model_which_all_silos_agree_on(
    method: str, tmp_path: Path, images: Path, random_tower: Path
) -> None:
    trained(Silos.with_method(method, tmp_path, images, random_tower))


@pytest.mark.parametrize(
    "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in METHODS]
)
def test_the_plan_that_init_writes_for_a_method_trains(
    method: str, tmp_path: Path, images: Path, random_tower: Path
) -> None:
    trained(Silos.as_init_writes_it(method, tmp_path, images, random_tower))


def trained(silos: Silos) -> None:
    """Run the federation to its end, and look at what came of it."""

    async def main() -> None:
        async with silos.site.serving(), asyncio.timeout(BOUND):
            await asyncio.gather(*(silos.train(name) for name in SILOS))

    asyncio.run(main())
    first, *others = (silos.models(name) for name in SILOS)
    assert others == [first, first]
    rounds = silos.accepted.contract.plan.training.rounds
    assert first[0] == silos.accepted.contract.lock.initial_model
    assert len(set(first)) == len(first) == 1 + rounds
    averaged = [row["survivors"] for row in silos.site.status().finished_rounds[:rounds]]
    assert averaged == [list(SILOS)] * rounds


def test_a_silo_that_stops_between_rounds_goes_on_with_its_private_adapter(
    tmp_path: Path, images: Path, random_tower: Path
) -> None:
    silos, name = Silos.with_method("feddat", tmp_path, images, random_tower), SILOS[0]
    kept = []

    def stop(text: str) -> None:
        if "round 1 of 2: averaged" in text:
            raise StoppedOnPurposeError

    async def main() -> None:
        async with silos.site.serving(), asyncio.timeout(BOUND):
            others = [asyncio.create_task(silos.train(other)) for other in SILOS[1:]]
            with pytest.raises(StoppedOnPurposeError):
                await silos.train(name, stop)
            kept.append(silos.kept(name))
            await silos.train(name)
            await asyncio.gather(*others)

    asyncio.run(main())
    (first,), second = kept, silos.kept(name)
    parts = [part.removeprefix("after.") for part in first if part.startswith("after.")]
    assert parts
    for part in parts:
        assert (second[f"before.{part}"] == first[f"after.{part}"]).all()
    assert any((second[f"after.{part}"] != second[f"before.{part}"]).any() for part in parts)
    assert any((first[f"after.{part}"] != first[f"before.{part}"]).any() for part in parts)
