"""What cached features save: 200 rounds of FedCLIP as here, against encoding every batch as the original program does.

`FEDCLIP_PACS_MINI=DIR python benchmarks/fedclip_original.py [--json]`: PACS with three silos and sketch left out, 60 %
of each silo's images for training, a ViT-B/32 with random weights (speed does not depend on them), the paper's loss
over batches of 32, Adam as in the paper, one local epoch a round; one process, all cores, but one
for our small steps.

- Original: in every step the batch's images are decoded, preprocessed and encoded, and so are the texts of its
  classes; then the adapter takes its step. Measured on three batches before our extraction and on three after it; of
  each part the faster of the two counts, scaled to all training records of 200 rounds. Its validation, which encodes
  images again too, is left out.
- Ours: one extraction of all images - every split of every silo, and the site that is left out - by
  `features.extract` with a fresh cache, and the class texts; then 200 rounds by `LocalTrainer` and their averages, all
  of them measured. Secure aggregation is left out on both sides.

`speedup` is the ratio of the two by the clock on the wall, `speedup_cpu` by the processor's time, which others on the
machine disturb less; `speedup_images_only` is by the wall and leaves the texts out of the original's time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from torch.nn.functional import cross_entropy, normalize

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import OpenClipEncoder
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.data.dataset import ImageFile, Task, split
from fedclip_secure.data.folder import read_folder
from fedclip_secure.data.image import load_image
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.features.extract import ExtractOptions, extract
from fedclip_secure.methods.registry import find_method
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.inputs import Inputs
from fedclip_secure.training.local_training import LocalTrainer, make_optimizer
from fedclip_secure.training.shared_parameters import read_shared

ROUNDS, BATCH, TURN = 200, 32, 3  # TURN: batches of the original in each of two measurements
TARGET = 100.0  # times as fast, at least
SITES, UNSEEN = ("art_painting", "cartoon", "photo"), "sketch"
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
CPU = torch.device("cpu")
Seconds = npt.NDArray[np.float64]  # (2,): see `now`
_NAME = "ViT-B-32"
_DATA = Path(os.environ.get("FEDCLIP_PACS_MINI", str(Path(__file__).parents[2] / "shared/data/pacs-mini")))


def now() -> Seconds:
    """(2,): by the clock on the wall, and of the processor over all threads."""
    return np.array([time.perf_counter(), time.process_time()])


def make_plan() -> FederationPlan:
    """The paper's settings."""
    adam = {"name": "adam", "lr": 5e-5, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2}
    plan = {
        "federation": "bench",
        "server": "https://localhost",
        "model": {"name": _NAME, "pretrained": "random"},
        "classes": {name: name for name in CLASSES},
        "templates": ["a picture of a {}"],
        "splits": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "method": {"name": "fedclip", "loss": "inbatch"},
        "training": {"rounds": ROUNDS, "batch_size": BATCH, "optimizer": adam},
    }
    return check(plan, FederationPlan, "benchmark's plan")


def make_encoder() -> tuple[Any, Encoder]:
    """open_clip's model with random weights, and the same as our encoder."""
    torch.manual_seed(0)
    config = open_clip.get_model_config(_NAME)
    model = open_clip.CLIP(**config)
    lock: dict[str, Any] = {
        "name": _NAME,
        "config": json.dumps(config),
        "weights_sha256": "0" * 64,
        "preprocessing": {
            "size": config["vision_cfg"]["image_size"],
            "mean": list(open_clip.OPENAI_DATASET_MEAN),
            "std": list(open_clip.OPENAI_DATASET_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
        "dim": config["embed_dim"],
        "logit_scale": 100.0,
    }
    return model, Encoder(model, check(lock, OpenClipEncoder, "benchmark's lock"), None, CPU)


class Original:
    """Training steps as in the original program: everything frozen is computed again for every batch."""

    def __init__(self, plan: FederationPlan, model: Any, encoder: Encoder, files: Sequence[ImageFile]) -> None:
        self._model, self._transform, self._files = model, encoder.transform, files
        tokens = open_clip.get_tokenizer(_NAME)([prompt for (prompt,) in plan.text_prompts()])
        self._tokens = tokens[torch.tensor([file.label for file in files])]  # made once, as there
        dim = encoder.lock.dim
        self._adapter = find_method(plan.method).build(
            Task(CLASSES, np.eye(len(CLASSES), dim, dtype=np.float32), 100.0), None
        )
        self._optimizer = make_optimizer(self._adapter.parameters(), plan.training.optimizer)

    def steps(self, places: Sequence[int]) -> dict[str, Seconds]:
        """Seconds of the parts, over the batches of BATCH records that begin at `places`."""
        spent = {part: np.zeros(2) for part in ("images", "texts", "step")}
        for start in places:
            rows = slice(start, start + BATCH)
            images = self._timed(spent, "images", lambda rows=rows: self._encoded(self._files[rows]))
            texts = self._timed(spent, "texts", lambda rows=rows: self._model.encode_text(self._tokens[rows]))
            self._timed(spent, "step", lambda images=images, texts=texts: self._step(images, texts))
        return spent

    @torch.no_grad()
    def _encoded(self, files: Sequence[ImageFile]) -> torch.Tensor:
        pixels = torch.stack([self._transform(load_image(file.path, None)) for file in files])
        return self._model.encode_image(pixels)  # type: ignore[no-any-return]

    def _step(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        similarity = 100.0 * self._adapter(images) @ normalize(texts, dim=-1).T
        own = torch.arange(len(images))
        loss = (cross_entropy(similarity, own) + cross_entropy(similarity.T, own)) / 2
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    @staticmethod
    def _timed(spent: dict[str, Seconds], part: str, work: Callable[[], Any]) -> Any:
        began = now()
        with torch.set_grad_enabled(part == "step"):
            found = work()
        spent[part] += now() - began
        return found


@dataclass(frozen=True, slots=True)
class Ours:
    """Seconds of the one extraction and of the rounds."""

    extraction: Seconds
    rounds: Seconds
    images: int
    training: int  # records


def ours(
    plan: FederationPlan, encoder: Encoder, sites: dict[str, list[ImageFile]], between: Callable[[], None]
) -> Ours:
    """Extract and train, all of it; `between` runs between the two, unmeasured."""
    began = now()
    with tempfile.TemporaryDirectory() as folder:
        found = [
            extract(files, encoder, Path(folder, name), lambda _: None, ExtractOptions())
            for name, files in sites.items()
        ]
    text = encoder.text_features(plan.text_prompts())
    extraction = now() - began
    between()
    task, shares = Task(CLASSES, text, 100.0), plan.splits.model_dump()
    inputs = [Inputs(task, split(one.features, plan.federation, shares)) for one in found[: len(SITES)]]
    torch.set_num_threads(1)  # steps this small are over before a second thread has woken up
    began = now()
    records = run_rounds(plan, task, inputs)
    rounds = now() - began
    return Ours(extraction, rounds, sum(map(len, sites.values())), records)


def run_rounds(plan: FederationPlan, task: Task, inputs: Sequence[Inputs]) -> int:
    """All rounds of the plan, averaged with equal weights as in the paper; the number of training records."""
    trainers = [LocalTrainer(plan, task, one.splits, CPU) for one in inputs]
    method = find_method(plan.method)
    state = read_shared(method.build(task, None), method.spec)
    for _ in range(plan.training.rounds):
        update = np.mean([trainer.train(state) for trainer in trainers], axis=0)
        state = AdapterState(state.layout, (state.vector + update).astype(np.float32))
    return sum(trainer.records for trainer in trainers)


def measure() -> dict[str, float]:
    """All figures; times in seconds."""
    plan, (model, encoder) = make_plan(), make_encoder()
    sites = {name: read_folder(_DATA / name, CLASSES).files for name in (*SITES, UNSEEN)}
    mixed = [file for files in sites.values() for file in files]
    np.random.default_rng(0).shuffle(mixed)
    original = Original(plan, model, encoder, mixed)
    original.steps([0])  # warms up
    turns = [original.steps([BATCH * number for number in range(TURN)])]
    later = [BATCH * number for number in range(TURN, 2 * TURN)]
    mine = ours(plan, encoder, sites, lambda: turns.append(original.steps(later)))
    return figures(turns, mine)


def figures(turns: list[dict[str, Seconds]], mine: Ours) -> dict[str, float]:
    """What `--json` prints."""
    scale = ROUNDS * mine.training / (BATCH * TURN)
    parts = {part: scale * np.min([turn[part] for turn in turns], axis=0) for part in turns[0]}
    original, total = sum(parts.values(), np.zeros(2)), mine.extraction + mine.rounds
    return {
        "speedup": original[0] / total[0],
        "speedup_cpu": original[1] / total[1],
        "speedup_images_only": (original - parts["texts"])[0] / total[0],
        "original_seconds": original[0],
        **{f"original_{part}_seconds": value[0] for part, value in parts.items()},
        "original_measured_records": BATCH * TURN * len(turns),
        "ours_seconds": total[0],
        "ours_extraction_seconds": mine.extraction[0],
        "ours_rounds_seconds": mine.rounds[0],
        "rounds": ROUNDS,
        "training_records": mine.training,
        "images": mine.images,
    }


def show(found: dict[str, float]) -> None:
    """The same for people."""
    print(
        f"original: {found['rounds']} rounds over {found['training_records']} training images: "
        f"{found['original_seconds'] / 60:.0f} minutes (scaled from {found['original_measured_records']} images)"
    )
    parts = ", ".join(f"{part} {found[f'original_{part}_seconds'] / 60:.1f}" for part in ("images", "texts", "step"))
    print(f"  of it minutes for {parts}")
    print(
        f"ours: {found['ours_extraction_seconds']:.1f} s for one extraction of {found['images']} images, "
        f"{found['ours_rounds_seconds']:.1f} s for {found['rounds']} rounds"
    )
    print(
        f"{found['speedup']:.0f} times as fast (at least {TARGET:g}), {found['speedup_cpu']:.0f} times by the "
        f"processor's time; {found['speedup_images_only']:.0f} times, if the original had its texts for nothing"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not (_DATA / UNSEEN).is_dir():
        sys.exit(f"FEDCLIP_PACS_MINI={_DATA}: holds no PACS; set it to a folder <domain>/<class>/<image>")
    found = measure()
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
