"""What an adapter says about images that nobody has labelled, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import ExternalModel
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.data.classes import some
from fedclip_secure.data.dataset import UNLABELLED, ImageFile
from fedclip_secure.data.folder import images_in
from fedclip_secure.data.listing import LeftOut, Listing
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.features.encoder import choose_device
from fedclip_secure.features.extract import ExtractOptions, extract
from fedclip_secure.features.progress import ShowProgress
from fedclip_secure.features.unusable_images import Broken
from fedclip_secure.methods.registry import find_method
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.evaluation.evaluate import batches, predictor
from fedclip_secure.training.inputs import load_with_task

# A spreadsheet takes a cell that begins with one of these for a formula, quoted or not (OWASP, CSV Injection).
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """`probabilities` (N, C) float64, softmax of the logits, of the images at `paths`; and the `broken` ones."""

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    probabilities: npt.NDArray[np.float64]
    broken: tuple[Broken, ...]


def find_images(paths: Iterable[Path]) -> Listing:
    """The files among `paths`, and the images under the folders among them: each once, folders in path order.

    A file that is named is taken as it is; in a folder, at any depth, what is an image by its extension or is DICOM.
    What is none is listed as left out.

    Raises:
        DataError: there is no such file or folder, one that cannot be looked at, or no image at all.
    """
    found, left_out = dict[Path, None](), dict[str, LeftOut]()
    listed = list(paths)
    for path in listed:
        if path.is_dir():
            images, others = images_in(path)
            found.update((Path(file), None) for file in images)
            left_out.update((one.path, one) for one in others)
        elif path.is_file():
            found[path] = None
        else:
            raise DataError(f"'{path}': is no file and no folder; check the path")
    if not found:
        raise DataError(f"{some(list(map(str, listed)))}: there is no image there; name files or another folder")
    return Listing(
        [ImageFile(path, UNLABELLED) for path in found],
        [one for path, one in left_out.items() if Path(path) not in found],
    )


def predict(
    silo: SiloConfig, contract: Contract, state: AdapterState, images: Sequence[Path], progress: ShowProgress
) -> Predictions:
    """Classify `images` with the adapter `state`; features come from the silo's cache, and go there.

    A broken image is left out.

    Raises:
        ConfigError: the plan's model is external: there is no encoder for images.
        DataError: the cache cannot be read or written.
        ModelError: the weights are not those of the lock, or `state` is not the plan's method's.
    """
    if isinstance(contract.plan.model, ExternalModel):
        raise ConfigError(
            "the plan's model is external, so no encoder for images runs here; make features with your own encoder, "
            "put them with their labels into the file at `data.path` of silo.yaml, and run `fedclip-silo evaluate`"
        )
    encoder, task = load_with_task(silo, contract)
    device = choose_device(silo.device)
    logits = predictor(contract.plan, task, state, device, encoder)
    files = [ImageFile(path, UNLABELLED) for path in images]
    options = ExtractOptions(stage=find_method(contract.plan.method).spec.stage)
    found = extract(files, encoder, Path(silo.workdir, "features"), progress, options)
    parts = [np.empty((0, len(task.classes)))]
    with torch.inference_mode():
        for batch in batches(found.features, task, device):
            parts.append(torch.softmax(logits(batch).cpu().double(), dim=-1).numpy())  # MPS has no float64
    broken = {image.number for image in found.broken}
    paths = tuple(path for number, path in enumerate(images) if number not in broken)
    return Predictions(task.classes, paths, np.concatenate(parts), tuple(found.broken))


def to_csv(predictions: Predictions) -> bytes:
    """`path,class,probability` and a column for each class in the plan's order; probabilities to 6 decimals.

    RFC 4180, in UTF-8; bytes of a file name that are no UTF-8 stay as they are. No cell is
    a formula to a spreadsheet: such a path begins with `./`, which names the same file, such a class with `'`.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    classes = [f"'{name}" if name.startswith(_FORMULA_STARTS) else name for name in predictions.classes]
    writer.writerow(["path", "class", "probability", *classes])
    for path, row in zip(map(str, predictions.paths), predictions.probabilities, strict=True):
        label = int(row.argmax())
        cells = [f"{value:.6f}" for value in row]
        writer.writerow(
            [f"./{path}" if path.startswith(_FORMULA_STARTS) else path, classes[label], cells[label], *cells]
        )
    return text.getvalue().encode("utf-8", "surrogateescape")
