"""What a person should know of their data before they train on them: what was read, left out, doubled or spoilt.

Everything in it stays with the silo.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedclip_secure.data.classes import some
from fedclip_secure.data.dataset import FeatureSet
from fedclip_secure.data.image_facts import CLIPPED, TINY, ImageFacts
from fedclip_secure.data.listing import LeftOut, Reason, kinds_of
from fedclip_secure.errors import DataError

PAGE, JSON, LEFT_OUT = "data-report.html", "data-report.json", "left-out.csv"  # in the workdir
_EQUALS = 3  # of a group of equal files that are named
EXAMPLES = 10  # named for each finding; the list of what was left out has all


def _line(group: Sequence[str]) -> str:
    """The paths of a group; what ends lines in a file's name is shown as such."""
    more = f" and {len(group) - _EQUALS} more" if len(group) > _EQUALS else ""
    return " = ".join(group[:_EQUALS]).replace("\n", "\\n").replace("\r", "\\r") + more


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was found in `count` images, or in so many files that are none.

    `text` is one line with the remedy. `groups` are all of them, as paths; what is equal stands in one group. Where
    `refused`, `strict` ends the run over it.
    """

    kind: str
    count: int
    text: str
    groups: tuple[tuple[str, ...], ...]
    refused: bool

    @property
    def examples(self) -> tuple[str, ...]:
        """The first of them, a line each."""
        return tuple(_line(group) for group in self.groups[:EXAMPLES])

    @property
    def more(self) -> int:
        """How many more there are than examples."""
        return len(self.groups) - len(self.examples)

    def told(self) -> str:
        """The text, and the examples below it, each in one line."""
        more = [f"  and {self.more} more, which {JSON} has"] * (self.more > 0)
        return "\n".join([self.text, *(f"  {one}" for one in self.examples), *more])


def each(paths: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Paths as groups of one."""
    return tuple((path,) for path in paths)


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """Of one split: records, patients where these are known, and records by the class's name."""

    images: int
    patients: int | None
    classes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class DataReport:
    """`patients_from` says who names them: `dicom`, `csv`, or the feature file's `ids`; None: nobody does.

    `without_patient` images are a unit each. `left_out` is everything that was, also what nobody misses.
    """

    used: int
    patients_from: str | None
    patients: int | None
    without_patient: int
    window: tuple[int, int] | None  # under which the images were looked at
    contents: str  # SHA-256 over those of all images, in order
    splits: Mapping[str, SplitCounts]
    smallest_class: str
    smallest: int
    findings: tuple[Finding, ...]
    left_out: tuple[LeftOut, ...]

    def as_json(self) -> dict[str, Any]:
        """All but the whole list of what was left out."""
        return {key: value for key, value in asdict(self).items() if key != "left_out"}

    def lines(self) -> list[str]:
        """What is said below the table of classes and splits."""
        smallest = f"smallest class: {self.smallest_class!r}, {self.smallest} image(s)"
        return [self.about_patients(), smallest, *(finding.told() for finding in self.findings)]

    def warnings(self) -> list[str]:
        """What is wrong, a line each: what `strict` refuses; and where its images are named, if there are images."""
        wrong = [finding.text for finding in self.findings if finding.refused]
        if wrong and self.contents:
            wrong.append(f"which images these are: {PAGE} and {JSON} in the workdir")
        return wrong

    def about_patients(self) -> str:
        """Who they are known by, and how many."""
        who = {"dicom": "PatientID of DICOM", "csv": "the CSV file", "ids": "the file's `ids`", None: ""}
        if self.patients is None:
            return "patients are not known: each image counts as a patient of its own"
        others = f"; {self.without_patient} image(s) without one count as one each" if self.without_patient else ""
        return f"{self.patients} patient(s), by {who[self.patients_from]}{others}"

    def of_class(self, name: str) -> int:
        """How many images a class has over all splits."""
        return sum(split.classes[name] for split in self.splits.values())

    def missed(self) -> int:
        """How many files were left out that somebody may miss."""
        return sum(one.reason is not Reason.PASSED_OVER for one in self.left_out)

    def check_strict(self) -> None:
        """Refuse what `strict` refuses.

        Raises:
            DataError: one line for each finding, with its first examples.
        """
        wrong = "\n".join(finding.told() for finding in self.findings if finding.refused)
        if wrong:
            raise DataError(f"the data are not as `strict` asks; mend this, or leave `strict` out:\n{wrong}")


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a report is made of: N records in `records`, each with its split's number in `places` (N,).

    `paths` and `facts` are those of the N images; empty where only features are there.
    """

    classes: Sequence[str]
    shares: Mapping[str, float]  # of the splits, by name
    records: FeatureSet
    places: npt.NDArray[np.int64]
    patients_from: str | None
    left_out: Sequence[LeftOut] = ()
    paths: Sequence[str] = ()
    facts: Sequence[ImageFacts] = ()
    about_patients: Sequence[Finding] = ()
    window: tuple[int, int] | None = None


def make_report(seen: Seen) -> DataReport:
    """Count, and look for what is wrong."""
    known = _with_patient(seen)
    counts = np.bincount(seen.records.labels, minlength=len(seen.classes))
    there = [(int(count), name) for count, name in zip(counts, seen.classes, strict=True) if count]
    smallest = min(there, default=(0, ""))
    return DataReport(
        used=len(seen.records),
        patients_from=seen.patients_from,
        patients=_patients(seen, known) if seen.patients_from else None,
        without_patient=int((~known).sum()),
        window=seen.window,
        contents=""
        if seen.records.record_ids is None
        else hashlib.sha256(seen.records.record_ids.tobytes()).hexdigest(),
        splits={name: _counts(seen, known, seen.places == number) for number, name in enumerate(seen.shares)},
        smallest_class=smallest[1],
        smallest=smallest[0],
        findings=(
            *why_left_out(seen.left_out),
            *seen.about_patients,
            *_doubles(seen),
            *_looks(seen),
            *_untrained(seen),
        ),
        left_out=tuple(seen.left_out),
    )


def _with_patient(seen: Seen) -> npt.NDArray[np.bool_]:
    """(N,): whose unit is more than the record itself."""
    if seen.patients_from is None or not seen.paths:
        return np.full(len(seen.records), seen.patients_from is not None)
    found: npt.NDArray[np.bool_] = (seen.records.unit_ids != seen.records.record_ids).any(axis=1)
    return found


def _patients(seen: Seen, chosen: npt.NDArray[np.bool_]) -> int:
    return len({unit.tobytes() for unit in seen.records.unit_ids[chosen]})


def _counts(seen: Seen, known: npt.NDArray[np.bool_], chosen: npt.NDArray[np.bool_]) -> SplitCounts:
    counts = np.bincount(seen.records.labels[chosen], minlength=len(seen.classes)).tolist()
    patients = _patients(seen, known & chosen) if seen.patients_from else None
    return SplitCounts(int(chosen.sum()), patients, dict(zip(seen.classes, counts, strict=True)))


_REMEDIES = {
    Reason.NO_IMAGE: ("are no image and were left out", "move them away if they are not wanted", True),
    Reason.PASSED_OVER: ("or folder(s) are hidden or a system's own, and were passed over", "", False),
    Reason.DANGLING: (
        "are links to what is not there, or placeholders of what was not downloaded, and were left out",
        "restore or download what they name",
        True,
    ),
    Reason.SPECIAL: ("are pipes, sockets or devices and were left out", "move them away", True),
    Reason.UNUSABLE: ("cannot be used and were left out", "replace them, or take them out of the data", True),
}


def why_left_out(left_out: Sequence[LeftOut]) -> Iterable[Finding]:
    """A finding for each reason."""
    for reason, (said, remedy, refused) in _REMEDIES.items():
        paths = [one.path for one in left_out if one.reason is reason]
        told = [one.detail or one.path for one in left_out if one.reason is reason]
        if paths:
            what = f" ({kinds_of(paths)})" if reason is Reason.NO_IMAGE else ""
            text = f"{len(paths)} file(s) {said}{what}" + (f"; {remedy}" if remedy else "")
            yield Finding(f"left out: {reason}", len(paths), text, each(told), refused)


def _doubles(seen: Seen) -> Iterable[Finding]:
    """Equal bytes, by what they have in common; a pair of labels or of splits is worse than a mere repetition."""
    if not seen.paths or seen.records.record_ids is None:
        return
    same = defaultdict[bytes, list[int]](list)
    for number, record in enumerate(seen.records.record_ids):
        same[record.tobytes()].append(number)
    labelled, torn, mere = list[list[int]](), list[list[int]](), list[list[int]]()
    for group in same.values():
        if len(group) > 1:
            labels, places = ({int(of[number]) for number in group} for of in (seen.records.labels, seen.places))
            labelled += [group] * (len(labels) > 1)
            torn += [group] * (len(places) > 1)
            mere += [group] * (len(labels) == len(places) == 1)
    for kind, found, text, refused in (
        ("equal bytes under several labels", labelled, "keep each under the one that is right", True),
        ("equal bytes in several splits", torn, "the same image is trained on and tested with: name one patient", True),
        ("equal bytes under one label", mere, "each counts as often as it is there", False),
    ):
        if found:
            count, equal = sum(map(len, found)), tuple(tuple(seen.paths[number] for number in group) for group in found)
            yield Finding(kind, count, f"{count} image(s): {kind}; {text}", equal, refused)


@dataclass(frozen=True, slots=True)
class _Look:
    """What may be seen of an image; `spoilt`: by the image, or by the window that it was read through."""

    kind: str
    is_so: Callable[[ImageFacts], bool]
    said: str
    refused: bool
    spoilt: bool = False


_LOOKS = (
    _Look("of one colour, or nearly", lambda facts: facts.one_coloured, "they show nothing", True, True),
    _Look("clipped", lambda facts: facts.clipped, f"{CLIPPED:.0%} or more of what is not black is white", True, True),
    _Look("of little contrast", lambda facts: facts.of_little_contrast, "few levels of 255 are used", False, True),
    _Look(
        "of more than 8 bits in colour or beside transparency",
        lambda facts: facts.deep_colour,
        "the upper 8 are read, whatever the plan's window: save photographs with 8 bits, and scans as grey",
        True,
    ),
    _Look("tiny", lambda facts: facts.tiny, f"shorter side below {TINY} pixels: are they thumbnails?", True),
    _Look("of several frames", lambda facts: facts.frames > 1, "the first counts, of DICOM's the middle one", False),
)


def _looks(seen: Seen) -> Iterable[Finding]:
    for look in _LOOKS:
        found = [path for path, facts in zip(seen.paths, seen.facts, strict=True) if look.is_so(facts)]
        if found:
            share = f"{len(found)} of {len(seen.paths)} image(s) ({_percent(len(found), len(seen.paths))})"
            remedy = _mended(seen.window) if look.spoilt else ""
            text = f"{share} are {look.kind}; {look.said}{remedy}"
            yield Finding(look.kind, len(found), text, each(found), look.refused)


def _percent(part: int, whole: int) -> str:
    return "below 1%" if 200 * part < whole else f"{part / whole:.0%}"


def _mended(window: tuple[int, int] | None) -> str:
    remedy = ": look at them, and replace what is spoilt"
    if window is None:
        return remedy
    return (
        f"{remedy}; of those with more than 8 bits, check that the plan's `model.image_window` fits this scanner, and "
        "tell the coordinator"
    )


def _untrained(seen: Seen) -> Iterable[Finding]:
    counts = [int((seen.places == number).sum()) for number in range(len(seen.shares))]
    empty = [name for (name, share), count in zip(seen.shares.items(), counts, strict=True) if share and not count]
    if empty and len(seen.records):
        text = f"split(s) without any image: {some(empty)}; where few patients have all of them, none may fall there"
        yield Finding("empty splits", len(empty), text, (), "train" in empty)
    if "train" in empty:
        return
    trained = seen.records.labels[seen.places == list(seen.shares).index("train")]
    lost = [seen.classes[label] for label in np.unique(seen.records.labels) if label not in trained]
    if lost:
        text = f"no image to train on, of class(es) {some(lost)}: all of them fell into other splits"
        yield Finding("classes that are not trained on", len(lost), text, (), False)
