"""The sites of an experiment: where they lie, and their features, extracted once."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedclip_secure import canonical
from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import SHIPPED, ExternalModel, FederationPlan, OpenClipModel
from fedclip_secure.config.silo import Data, EmbeddingsData, FolderData, SiloConfig
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.data.drawn import labs
from fedclip_secure.data.sites import absent_classes, classes_in, folders_in, silo_name
from fedclip_secure.disk import telling
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.features.progress import ShowProgress
from fedclip_secure.simulate.experiment import DemoSites, EmbeddingSites, Experiment, FolderSites
from fedclip_secure.simulate.partition import joined
from fedclip_secure.training.inputs import load_inputs
from fedclip_secure.training.prepare import prepare

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where each site's data lie, by the site's own name, and the classes of all of them (folder: phrase).

    `home` is the folder of the experiment's file, `out` that of its results.
    """

    sites: dict[str, Data]
    classes: dict[str, str]
    home: Path
    out: Path


@dataclass(frozen=True, slots=True, eq=False)
class Sites:
    """Whole sites, as one method takes them; `data` is how one of them is written in silo.yaml."""

    task: Task
    encoder: Encoder | None
    features: dict[str, FeatureSet]  # by the site's name
    data: Data

    def fingerprint(self) -> bytes:
        """32 bytes over features and labels of all sites, and the features of the prompts."""
        sites = [
            [name, _hash(one.image_features), _hash(one.labels), _hash(one.unit_ids)]
            for name, one in self.features.items()
        ]
        return canonical.digest("fedclip/v1/simulated-data", sites, _hash(self.task.text_features))


def _hash(array: npt.NDArray[np.generic]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).digest()


def find_sources(experiment: Experiment, home: Path, out: Path) -> Sources:
    """Look at the data's folders, or draw the labs in `out`.

    Raises:
        ConfigError: no sites, too few classes, or names that cannot stand beside each other.
        DataError: the disk refuses.
    """
    data = experiment.data
    if isinstance(data, EmbeddingSites):
        files = {
            site: EmbeddingsData(format="embeddings", path=path, ids=data.ids, per_record=data.per_record)
            for site, path in data.files.items()
        }
        return _checked(Sources(dict(files), dict(experiment.classes or {}), home, out))
    folder = Path(data.path) if isinstance(data, FolderSites) else _drawn(data, out)
    sites = folders_in(folder)
    found = classes_in(sites) if isinstance(data, FolderSites) else dict(labs.CLASSES)
    classes = dict(experiment.classes or found)
    if len(classes) < 2:
        raise ConfigError(f"'{folder}': holds no DIR/<site>/<class>/ folders of at least 2 classes; check data.path")
    absent = {site: absent_classes(site, list(classes)) for site in sites}
    folders = {site.name: FolderData(format="folder", path=str(site), absent_classes=absent[site]) for site in sites}
    return _checked(Sources(dict(folders), classes, home, out))


def _drawn(data: DemoSites, out: Path) -> Path:
    """The labs' folder, drawn to its end."""
    folder, half = out / f"labs-{data.seed}", out / f"labs-{data.seed}.part"
    if not folder.exists():
        labs.write_labs(half, data.seed)
        with telling(folder, "be written"):
            half.rename(folder)
    return folder


def _checked(sources: Sources) -> Sources:
    names = [silo_name(site) for site in sources.sites]
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise ConfigError(f"data: two sites would both be called {twins[0]!r} as silos; rename one")
    return sources


def load_sites(experiment: Experiment, sources: Sources, plan: FederationPlan, progress: ShowProgress) -> Sites:
    """All sites as the method of `plan` takes them; what the cache lacks is extracted.

    Raises:
        ConfigError, DataError, ModelError: as `load_inputs` and `prepare`.
    """
    contract = Contract(plan, prepare(plan, sources.home).lock)
    text = sources.home / plan.model.text_features if isinstance(plan.model, ExternalModel) else None
    found = {site: load_inputs(_config(experiment, sources, site), contract, progress, text) for site in sources.sites}
    for site, inputs in found.items():
        for line in inputs.report.warnings() if inputs.report else ():
            _log.warning("%s: %s", site, line)
    one = next(iter(found.values()))
    features = {site: joined(list(inputs.splits.values())) for site, inputs in found.items()}
    return Sites(one.task, one.encoder, features, next(iter(sources.sites.values())))


def _config(experiment: Experiment, sources: Sources, site: str) -> SiloConfig:
    workdir = sources.out / "sites" / silo_name(site)
    return SiloConfig(
        name=silo_name(site),
        data=sources.sites[site],
        workdir=str(workdir),
        weights=_weights(experiment, sources.home),
        tokenizer=_tokenizer(experiment, sources.home),
        device=experiment.device,
    )


def _weights(experiment: Experiment, home: Path) -> str | None:
    """The checkpoint beside the experiment's file, where the model names one and no tag."""
    model = experiment.model
    if isinstance(model, ExternalModel) or model.name == SHIPPED:
        return None
    path = home / model.pretrained
    return str(path) if path.is_file() else None


def _tokenizer(experiment: Experiment, home: Path) -> str | None:
    """The folder beside the experiment's file, where the model names one."""
    named = experiment.model.tokenizer if isinstance(experiment.model, OpenClipModel) else None
    return None if named is None else str(home / named)


def named_as_silos(features: Mapping[str, FeatureSet]) -> dict[str, FeatureSet]:
    """By the names that a roster takes, without those sites that have no records.

    Raises:
        DataError: nobody has any.
    """
    found = {silo_name(site): records for site, records in features.items() if len(records)}
    if not found:
        raise DataError("no site has records; check `data`")
    return found
