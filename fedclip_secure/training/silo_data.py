"""A silo's own data: found, read through the cache, cut into splits, and reported to the person who keeps them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.config.silo import EmbeddingsData, FolderData, ManifestData, SiloConfig
from fedclip_secure.data.dataset import FeatureSet, Task, places_of
from fedclip_secure.data.embeddings import read_embeddings
from fedclip_secure.data.folder import read_folder
from fedclip_secure.data.image import FileKind, file_kinds, named_as_picture
from fedclip_secure.data.image_facts import ImageFacts
from fedclip_secure.data.listing import LeftOut, Listing, Reason
from fedclip_secure.data.manifest import read_manifest, with_patients
from fedclip_secure.data.page import EACH_CLASS, render_page, thumbnail
from fedclip_secure.data.report import JSON, LEFT_OUT, PAGE, DataReport, Finding, Seen, each, make_report
from fedclip_secure.disk import telling
from fedclip_secure.errors import ConfigError
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.features.extract import INDEX_NAME, Extraction, ExtractOptions, extract
from fedclip_secure.features.patients import with_dicom_patients
from fedclip_secure.features.progress import ShowProgress
from fedclip_secure.features.stage import FEATURES
from fedclip_secure.files import write_atomically
from fedclip_secure.names import Column

_MODE = 0o600  # the page shows images


@dataclass(frozen=True, slots=True, eq=False)
class SiloData:
    """The records, and what there is to know of them."""

    features: FeatureSet
    report: DataReport


def read_silo_data(
    silo: SiloConfig,
    plan: FederationPlan,
    task: Task,
    encoder: Encoder | None,
    *,
    progress: ShowProgress,
    options: ExtractOptions,
) -> SiloData:
    """Read what `data` in silo.yaml names; write the report into the workdir, where it is another than before.

    Raises:
        ConfigError: the format does not go with the plan's model or method.
        DataError: images or feature files are at fault; or `strict` refuses the report, which is written first.
    """
    if isinstance(silo.data, EmbeddingsData):
        return _of_embeddings(silo.data, plan, task, options)
    if encoder is None:
        raise ConfigError(
            "silo.yaml: data.format: the plan's model is external and no encoder runs here; set `embeddings`"
        )
    features = Path(silo.workdir, "features")
    listed = _listed(silo.data, plan, features / INDEX_NAME, verify=options.verify)
    found = extract(listed.listing.files, encoder, features, progress, options)
    seen = _seen(listed, found, plan, task.classes, encoder.window)
    report = make_report(seen)
    _write(Path(silo.workdir), silo.name, report, seen, encoder.window)
    if silo.data.strict:
        report.check_strict()
    return SiloData(found.features, report)


def _of_embeddings(data: EmbeddingsData, plan: FederationPlan, task: Task, options: ExtractOptions) -> SiloData:
    if options.stage != FEATURES:
        raise ConfigError(
            f"silo.yaml: data.format: the plan's method takes {options.stage.kind} of images, and `embeddings` "
            "are features; set `folder` or `manifest`"
        )
    features = read_embeddings(Path(data.path), task.classes, task.text_features.shape[1])
    shares = plan.splits.model_dump()
    places = places_of(features, plan.federation, shares)
    patients_from = "ids" if data.ids == "patient" else None
    return SiloData(features, make_report(Seen(task.classes, shares, features, places, patients_from)))


@dataclass(frozen=True, slots=True)
class _Listed:
    """What there is to read, with the patients; who named these; and what is strange about them."""

    listing: Listing
    patients_from: str | None = None
    findings: Sequence[Finding] = ()
    undecided: bool = False  # nobody names patients, and no person said so


def _listed(data: FolderData | ManifestData, plan: FederationPlan, index: Path, *, verify: bool) -> _Listed:
    listing, asked = _found(data, tuple(plan.classes)), data.patients.dicom
    if any(file.unit is not None for file in listing.files):
        return _Listed(listing, "csv")
    kinds = [] if asked is False else file_kinds([str(file.path) for file in listing.files])
    dicom = [kind is FileKind.DICOM for kind in kinds if kind is not FileKind.CLOSED]
    if asked is None and any(dicom) and not all(dicom):
        return _Listed(listing, None, [_some_dicom(sum(dicom), len(dicom), data)], undecided=True)
    if not asked and not any(dicom):
        return _Listed(listing, undecided=asked is None)
    _check_asked(data, plan)
    listing.files, strange = with_dicom_patients(
        listing.files, index, data.patients.normalise, _otherwise(data), asked=asked is not None, verify=verify
    )
    return _Listed(listing, "dicom", strange)


def _found(data: FolderData | ManifestData, classes: Sequence[str]) -> Listing:
    path, how = Path(data.path), data.patients.normalise
    if isinstance(data, ManifestData):
        root = path.parent if data.root is None else Path(data.root)
        return Listing(read_manifest(path, root, classes, data.absent_classes, normalise=how, columns=_columns(data)))
    listing, named = read_folder(path, classes, data.absent_classes), data.patients
    if named.file is not None:
        listing.files = with_patients(listing.files, Path(named.file), path, normalise=how, columns=named.columns)
    return listing


def _check_asked(data: FolderData | ManifestData, plan: FederationPlan) -> None:
    """That PatientID means a patient must be a person's word where a promise for each patient rests on it."""
    if data.patients.dicom is None and plan.privacy is not None and plan.privacy.unit == "patient":
        raise ConfigError(
            "silo.yaml: data.patients: the plan protects each patient, and only PatientID of DICOM names them; set "
            "`patients: dicom` if all files of a patient have the same one. If it is a pseudonym that changes with the "
            "study, name the patients by a list of your own instead"
        )


def _otherwise(data: FolderData | ManifestData) -> str:
    """How patients are named where PatientID does not."""
    where = "a CSV file at `data.patients`" if isinstance(data, FolderData) else "a column `patient` of the manifest"
    return f"name the patients of all images in {where}, or set `data.patients: none` in silo.yaml"


def _some_dicom(dicom: int, files: int, data: FolderData | ManifestData) -> Finding:
    text = (
        f"{dicom} of {files} images that were found are DICOM, whose PatientID is not read as the others have none: "
        f"each image counts as a patient of its own; {_otherwise(data)}"
    )
    return Finding("PatientIDs that are not read", dicom, text, (), refused=True)


def _columns(data: ManifestData) -> Mapping[Column, str]:
    """Where silo.yaml says who names patients, or that nobody does, no column of the manifest does."""
    return data.columns if data.patients.dicom is None else {**data.columns, "patient": ""}


def _seen(
    listed: _Listed, found: Extraction, plan: FederationPlan, classes: Sequence[str], window: tuple[int, int] | None
) -> Seen:
    shares, paths = plan.splits.model_dump(), [file.path for file in listed.listing.files]
    broken = {image.number for image in found.broken}
    used = [path for number, path in enumerate(paths) if number not in broken]
    left_out = [LeftOut(str(image.path), Reason.UNUSABLE, image.reason) for image in found.broken]
    return Seen(
        classes,
        shares,
        found.features,
        places_of(found.features, plan.federation, shares),
        listed.patients_from,
        [*listed.listing.left_out, *left_out],
        [str(path) for path in used],
        found.facts,
        [*listed.findings, *(_disguised(used, found.facts) if listed.undecided else ())],
        window,
    )


def _disguised(paths: Sequence[Path], facts: Sequence[ImageFacts]) -> Iterator[Finding]:
    """What is DICOM is known by its name before it is read, and by its bytes afterwards."""
    found = [str(path) for path, seen in zip(paths, facts, strict=True) if seen.dicom and named_as_picture(str(path))]
    if found:
        text = (
            f"{len(found)} image(s) are DICOM under the name of another format, and their PatientID is not read: "
            "rename them to .dcm, or name their patients in a CSV file at `data.patients` in silo.yaml"
        )
        yield Finding("DICOM under another name", len(found), text, each(found), refused=True)


def _write(workdir: Path, silo: str, report: DataReport, seen: Seen, window: tuple[int, int] | None) -> None:
    """All three files, where the report is another than the one that lies there: thumbnails take a while."""
    said = json.dumps(report.as_json(), indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
    listed = _as_csv(report.left_out)
    files = {workdir / LEFT_OUT: listed, workdir / JSON: said}
    if all(_holds(path, data) for path, data in files.items()) and _is_whole(workdir / PAGE):
        return
    by_class = _some_of_each(seen)
    shown = {path for paths in by_class.values() for path in paths}
    shown |= {path for finding in report.findings for path in finding.examples} & set(seen.paths)
    thumbnails = {path: thumbnail(Path(path), window) for path in sorted(shown)}
    page = render_page(report, silo, by_class, thumbnails)
    for path, data in {workdir / PAGE: page.encode("utf-8", "backslashreplace"), **files}.items():
        write_atomically(path, data, _MODE)


def _is_whole(page: Path) -> bool:
    with telling(page):
        return page.is_file() and page.read_bytes().endswith(b"</html>")


def _holds(path: Path, data: bytes) -> bool:
    with telling(path):
        return path.is_file() and path.read_bytes() == data


def _some_of_each(seen: Seen) -> dict[str, list[str]]:
    """The first images of each class."""
    found: dict[str, list[str]] = {name: [] for name in seen.classes}
    for path, label in zip(seen.paths, seen.records.labels.tolist(), strict=True):
        if len(found[seen.classes[label]]) < EACH_CLASS:
            found[seen.classes[label]].append(path)
    return found


def _as_csv(left_out: Sequence[LeftOut]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "reason", "detail"])
    writer.writerows([one.path, str(one.reason), " ".join(one.detail.split())] for one in left_out)
    return text.getvalue().encode("utf-8", "surrogateescape")
