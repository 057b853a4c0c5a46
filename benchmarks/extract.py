"""How near extraction comes to the model's own speed, and how fast a second one over unchanged files is.

`FEDCLIP_PACS_MINI=DIR python benchmarks/extract.py [--json]`: 256 JPEGs of PACS through a ViT-B/32 with random
weights. Forward on tensors that lie in memory, extraction in fp32 and extraction in bf16 take turns, so that
a busy machine slows all three; median of three. Then 100,000 tiny files through a tiny tower of as wide
features (D = 512): a first `load_inputs`, and a second one, which is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.data.image import load_image
from fedclip_secure.features.batch_size import batch_size
from fedclip_secure.features.encoder import Encoder, load_encoder, resolve
from fedclip_secure.features.extract import ExtractOptions, extract
from fedclip_secure.features.progress import Progress
from fedclip_secure.training.inputs import load_inputs
from fedclip_secure.training.prepare import prepare

IMAGES, RUNS, SMALL_FILES = 256, 3, 100_000
FRACTION_LIMIT = 0.9  # of the forward's images/s
UNCHANGED_LIMIT = 5.0  # seconds, imports left out
_DATA = os.environ.get("FEDCLIP_PACS_MINI", str(Path(__file__).parents[2] / "shared/data/pacs-mini"))
_CLASSES = ("cat", "dog")
_VIT = open_clip.get_model_config("ViT-B-32")
_TINY = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_tower(folder: Path, config: dict[str, Any]) -> FederationPlan:
    """Write config and random weights of a tower into `folder`; a plan that names them."""
    folder.mkdir(parents=True)
    (folder / "tower.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "tower.safetensors")
    plan = {
        "federation": "bench",
        "server": "https://localhost",
        "model": {"name": "tower", "pretrained": "tower.safetensors", "config": "tower.json"},
        "classes": {name: name for name in _CLASSES},
        "templates": ["a {}"],
        "splits": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "method": {"name": "fedclip"},
        "training": {"rounds": 1, "batch_size": 32, "optimizer": {"name": "adam", "lr": 1e-3}},
    }
    return check(plan, FederationPlan, "benchmark's plan")


def against_forward(folder: Path, data: Path) -> dict[str, list[float]]:
    """Images/s of forward and of extraction in fp32 and bf16, run after run; PACS's photos come first."""
    model = write_tower(folder / "vit", _VIT).model
    paths = sorted(data.rglob("*.jpg"), key=lambda path: ("photo" not in path.parts, path))[:IMAGES]
    if len(paths) < IMAGES:
        sys.exit(f"FEDCLIP_PACS_MINI={data}: holds {len(paths)} .jpg files, {IMAGES} are needed")
    files = [ImageFile(path, 0) for path in paths]
    exact = resolve(model, folder / "vit")[0]
    weights = folder / "vit" / "tower.safetensors"
    encoders = {kind: load_encoder(exact.lock, model, weights, "cpu", kind) for kind in ("fp32", "bf16")}
    at_once = batch_size(encoders["fp32"])
    images = [exact.transform(load_image(path, None)) for path in paths]
    batches = torch.stack(images).split(at_once)
    work: dict[str, Callable[[], object]] = {"forward": lambda: [encoders["fp32"].encode_images(b) for b in batches]}
    for kind, encoder in encoders.items():
        work[kind] = lambda encoder=encoder: _extract(files, encoder, folder)
    _warm_up(list(encoders.values()), batches[0])
    return {name: [IMAGES / seconds for seconds in times] for name, times in _in_turns(work).items()}


def _extract(files: list[ImageFile], encoder: Encoder, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as store:
        extract(files, encoder, Path(store), lambda _: None, ExtractOptions())


def _warm_up(encoders: list[Encoder], batch: torch.Tensor) -> None:
    for encoder in encoders:
        encoder.encode_images(batch)


def _in_turns(work: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each, `RUNS` times."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(RUNS):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return times


def _ratio(values: list[float], others: list[float]) -> float:
    """Median over the runs, each against its neighbour: what slows the machine for a while slows both."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def write_small_files(folder: Path, count: int) -> None:
    """`count` different PPM images of 4 x 4 pixels, in two classes, old enough for the index."""
    random = np.random.default_rng(0)
    old = time.time() - 3600
    for name in _CLASSES:
        (folder / name).mkdir(parents=True)
    for number, pixels in enumerate(random.integers(0, 256, (count, 48), dtype=np.uint8)):
        path = folder / _CLASSES[number % 2] / f"{number:06}.ppm"
        path.write_bytes(b"P6 4 4 255\n" + pixels.tobytes())
        os.utime(path, (old, old))


@dataclass(frozen=True, slots=True)
class Loaded:
    """One `load_inputs`: how long it took, and by how much its peak memory grew over the last three quarters."""

    seconds: float
    growth: float  # megabytes, of extraction alone, before the features are put into one array


def small_files(folder: Path, count: int) -> tuple[Loaded, Loaded]:
    """A first and a second `load_inputs` over `count` files, each in a process of its own."""
    write_small_files(folder / "images", count)
    plan = write_tower(folder / "tiny", _TINY)
    (folder / "plan.json").write_text(plan.model_dump_json(), encoding="utf-8")
    return _load_in_a_process(folder), _load_in_a_process(folder)


def _load_in_a_process(folder: Path) -> Loaded:
    command = [sys.executable, __file__, "--load", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return Loaded(**json.loads(done.stdout.splitlines()[-1]))


def load(folder: Path) -> Loaded:
    """What such a process does; the time is without the imports and without making the plan's lock."""
    plan = FederationPlan.model_validate_json((folder / "plan.json").read_text("utf-8"))
    contract = Contract(plan, prepare(plan, folder / "tiny").lock)
    silo = SiloConfig.model_validate(
        {
            "name": "bench",
            "data": {"format": "folder", "path": str(folder / "images")},
            "workdir": str(folder / "work"),
            "weights": str(folder / "tiny" / "tower.safetensors"),
            "device": "cpu",
        }
    )
    peaks: list[tuple[float, float]] = []  # share of the images, megabytes

    def show(progress: Progress) -> None:
        peaks.append((progress.done / progress.total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000))

    began = time.perf_counter()
    load_inputs(silo, contract, show)
    seconds = time.perf_counter() - began
    return Loaded(seconds, peaks[-1][1] - next(peak for share, peak in peaks if share >= 0.25))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # the benchmark's own second process
    options = parser.parse_args()
    if options.load:
        print(json.dumps(asdict(load(options.load))))
        return
    with tempfile.TemporaryDirectory() as name:
        runs = against_forward(Path(name), Path(_DATA))
        first, second = small_files(Path(name), SMALL_FILES)
    speeds = {name: statistics.median(values) for name, values in runs.items()}
    figures = {
        "fraction_of_forward": _ratio(runs["fp32"], runs["forward"]),
        "images_per_second": speeds["fp32"],
        "bf16_speedup": _ratio(runs["bf16"], runs["fp32"]),
        "unchanged_seconds": second.seconds,
    }
    if options.json:
        print(json.dumps(figures))
        return
    print(f"forward {speeds['forward']:.1f} images/s, extraction {speeds['fp32']:.1f}:", end=" ")
    print(f"{figures['fraction_of_forward']:.3f} of it (at least {FRACTION_LIMIT:g})")
    print(f"in bf16 {speeds['bf16']:.1f} images/s: {figures['bf16_speedup']:.2f} times as many")
    print(
        f"{SMALL_FILES} small files: first {first.seconds:.1f} s, {SMALL_FILES / first.seconds:.0f} images/s;", end=" "
    )
    print(f"peak memory grew by {first.growth:.1f} MB over the last three quarters")
    print(f"unchanged: {second.seconds:.2f} s (limit {UNCHANGED_LIMIT:g} s)")


if __name__ == "__main__":
    main()
