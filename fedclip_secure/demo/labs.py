"""What the demo is about: its sites with their images, and the plan over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedclip_secure.config.plan import KNOWS, SHIPPED
from fedclip_secure.data.drawn import labs
from fedclip_secure.data.sites import absent_classes, classes_in, folders_in, silo_name
from fedclip_secure.demo.settings import Private, method_block, settings_of
from fedclip_secure.errors import ConfigError
from fedclip_secure.files import write_atomically
from fedclip_secure.names import AGGREGATOR, MIN_SILOS

FEDERATION = "demo"
UNSEEN = "willow"  # of the drawn labs
MOST_SILOS = 50
EPSILON = 4.0  # of the plan with --dp
CAP = 8.0  # epsilon that each lab of the demo sets as its lifetime limit
KILL_NEEDS = 4  # silos: with three, none may be absent from a round
KILL_ROUNDS = 2  # one that the silo takes part in, and one in whose middle it is killed


@dataclass(frozen=True, slots=True)
class Options:
    """What a person asked for."""

    out: Path
    data: Path | None = None  # DIR/<site>/<class>/*; None: drawn labs
    unseen: str | None = None
    rounds: int | None = None  # None: what suits the method
    silos: int | None = None
    method: str = "fedclip"
    kill_one: bool = False
    dp: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Site:
    """One lab: `name` as its folder is called, `silo` as the roster calls it."""

    name: str
    images: Path

    @property
    def silo(self) -> str:
        """A name that certificates take."""
        return silo_name(self.name)


@dataclass(frozen=True, slots=True)
class Scene:
    """The sites that train, the one that does not, and the classes they share."""

    training: tuple[Site, ...]
    unseen: Site | None
    classes: dict[str, str]  # folder: phrase
    template: str

    def absent(self, site: Site) -> list[str]:
        """Classes of which a site has no images."""
        return absent_classes(site.images, list(self.classes))


def encoder_of(options: Options) -> str:
    """What encodes the sites' images, for whoever reads the figures."""
    if options.data is None:
        return SHIPPED
    return (
        f"{SHIPPED}, which {KNOWS}: accuracies on images of your own are near chance, and show that the rounds work; "
        "a federation of your own names a real encoder (`model` in federation.yaml)"
    )


def rounds_of(options: Options) -> int:
    """As many as were asked for, or as suit the method."""
    return settings_of(options.method).rounds if options.rounds is None else options.rounds


def check_options(options: Options) -> None:
    """Refuse what can be refused before anything is written.

    Raises:
        ConfigError: the demo has no such method; it does not go with the rounds, or with --dp; or as `check_data`.
    """
    settings, rounds = settings_of(options.method), rounds_of(options)
    if settings.one_sum and rounds != 1:
        raise ConfigError(f"--rounds {rounds}: {options.method} adds each record up once, in one round; leave it out")
    if options.kill_one and rounds < KILL_ROUNDS:
        raise ConfigError(
            f"--kill-one: a silo is killed in its second round at the earliest, and this run has {rounds}"
        )
    if options.dp and settings.private is None:
        raise ConfigError(
            f"--dp: every parameter gets noise, and {options.method} trains millions on some hundred images: nothing "
            "would be left of the model; choose another --method, as fedclip, or leave --dp out"
        )
    check_data(options)


def check_data(options: Options) -> None:
    """Refuse sites that cannot be, as far as they are there already.

    Raises:
        ConfigError: as `set_scene`; or the output would become a site.
    """
    if options.data is None:
        if options.unseen not in (None, *labs.LABS):
            raise ConfigError(f"--unseen {options.unseen}: the drawn labs are {', '.join(labs.LABS)}")
        return
    if options.out.resolve().is_relative_to(options.data.resolve()):
        raise ConfigError(f"--out {options.out}: lies inside --data {options.data}; choose a folder outside")
    set_scene(options)


def set_scene(options: Options) -> Scene:
    """Draw the labs, or look at the folders of `options.data`.

    Raises:
        ConfigError: too few sites, or no such site.
        DataError: the disk refuses.
    """
    if options.data is None:
        folder = options.out / "labs"
        labs.write_labs(folder, options.seed)
        return _scene(options, folder, options.unseen or UNSEEN, dict(labs.CLASSES), "a micrograph of {}")
    classes = classes_in(folders_in(options.data))
    if len(classes) < 2:
        raise ConfigError(f"'{options.data}': holds no DIR/<site>/<class>/ folders of at least 2 classes")
    return _scene(options, options.data, options.unseen, classes, "a picture of a {}")


def write_plan(path: Path, scene: Scene, options: Options, server: str) -> None:
    """Write the demo's `federation.yaml`."""
    settings = settings_of(options.method)
    # Nobody goes silent but a silo that is killed; a step through a tower may take a busy machine a while.
    patience = "15s" if options.kill_one else "10m"
    plan: dict[str, Any] = {
        "federation": FEDERATION,
        "server": server,
        "purpose": f"a demonstration with {'drawn images' if options.data is None else 'images of your own'}; "
        "its adapter is for nothing else",
        "contact": "whoever ran `fedclip-agg demo` on this machine",
        "retention": "everything stays in the demonstration's folder, which may be deleted at any time",
        "model": {"name": SHIPPED, "pretrained": "shipped"},
        "classes": scene.classes,
        "templates": [scene.template],
        "splits": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "method": method_block(options.method, [site.silo for site in scene.training]),
        "training": plain_training(options),
        "secure_aggregation": {
            "coordinate_clip": settings.coordinate_clip,
            "max_weight": 10_000,
            "weights": settings.weights,
        },
        "deadlines": dict.fromkeys(("join", "share", "upload", "agree", "unmask"), patience),
    }
    if options.dp:
        assert settings.private is not None  # noqa: S101 - `check_options` has seen it
        _make_private(plan, settings.private)
    write_atomically(path, yaml.safe_dump(plan, sort_keys=False, allow_unicode=True).encode())


def plain_training(options: Options) -> dict[str, Any]:
    """The plan's `training` without privacy; also how a lab that trains alone does it, for its model stays at home."""
    settings = settings_of(options.method)
    return {
        "rounds": rounds_of(options),
        "local_epochs": 1,
        "batch_size": settings.batch_size,
        "optimizer": dict(settings.optimizer),
        "seed": options.seed,
    }


def _make_private(plan: dict[str, Any], private: Private) -> None:
    """Constants of the plan alone: none of them follows from how many images a lab has."""
    plan["splits"] = {"train": 0.8, "validation": 0.0, "test": 0.2}
    del plan["training"]["local_epochs"], plan["training"]["batch_size"]
    plan["training"]["optimizer"] = dict(private.optimizer)
    plan["secure_aggregation"] |= {"weights": "equal", "coordinate_clip": private.coordinate_clip}
    plan["privacy"] = {
        "unit": "record",
        "sample_rate": private.sample_rate,
        "steps_per_round": private.steps,
        "target_epsilon": EPSILON,
        "max_grad_norm": private.max_grad_norm,
        "update_divisor": private.divisor,
        "delta": 1e-5,
        "max_retrains": 1,
    }


def _scene(options: Options, folder: Path, unseen: str | None, classes: dict[str, str], template: str) -> Scene:
    sites = [Site(path.name, path.resolve()) for path in folders_in(folder)]
    names = [site.name for site in sites]
    if unseen is not None and unseen not in names:
        raise ConfigError(f"--unseen {unseen}: there is no such site; {folder} holds {', '.join(names) or 'none'}")
    training = [site for site in sites if site.name != unseen][: options.silos]
    least = KILL_NEEDS if options.kill_one else MIN_SILOS
    if len(training) < max(least, options.silos or 0):
        raise ConfigError(
            f"{len(training)} site(s) of {folder} would train; {max(least, options.silos or 0)} are needed"
            + (" to kill one" if options.kill_one else "")
        )
    if len(training) > MOST_SILOS:
        raise ConfigError(
            f"{len(training)} sites of {folder} would train, each a process; at most {MOST_SILOS}: --silos"
        )
    if not all(str(site.images).isprintable() and site.silo != AGGREGATOR for site in sites):
        raise ConfigError(f"'{folder}': a site's name holds control characters or is {AGGREGATOR!r}; rename it")
    if len({site.silo for site in training}) != len(training):
        raise ConfigError(f"'{folder}': two sites would get the same name in a certificate; rename one")
    return Scene(tuple(training), next((s for s in sites if s.name == unseen), None), classes, template)
