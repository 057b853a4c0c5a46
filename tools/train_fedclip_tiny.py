"""Train fedclip-tiny, the small CLIP of the demo: `python tools/train_fedclip_tiny.py [OUT_DIR] [--seed 1]`.

Contrastive pre-training (Radford et al. 2021) on captioned drawings in random looks, each seen once. It
takes about half an hour on two free cores: one draws, one trains. The looks of the demo's labs are not
among those it sees.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from fedclip_secure.data.drawn.drawings import draw
from fedclip_secure.data.drawn.labs import CLASSES
from fedclip_secure.data.drawn.staining import Look, random_look, render

NAME = "fedclip-tiny"
OUT = Path(__file__).resolve().parent.parent / "fedclip_secure" / "assets" / NAME
CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 4, "width": 96, "head_width": 24},
    # The vocabulary is the tokenizer's, so only a narrow text tower keeps the file small.
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PICTURES = ("a micrograph", "a microscope image", "a photo", "an image", "a picture", "a slide", "a field of view")
TEMPLATES = ("{picture} of {phrase}", "{picture} showing {phrase}", "{phrase} under the microscope", "{phrase}")
PRE_TRAINING = 2**31  # in the place of a class: no lab draws with these numbers
BATCH = 128
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 1.5e-3, 0.05, 300  # peak of a cosine; steps of linear growth before it
COLOURS = {  # red, green, blue
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "purple": (1, 0, 1),
    "turquoise": (0, 1, 1),
}
MAX_LOGIT_SCALE = float(np.log(100))  # as in the paper: the temperature stays above 0.01


class CaptionedDrawings(Dataset[tuple[Tensor, Tensor]]):
    """Picture and tokens by number; the number and the seed decide both."""

    def __init__(self, seed: int, length: int) -> None:
        self._seed, self._length = seed, length
        self._transform = open_clip.image_transform(64, is_train=False)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng([self._seed, number, PRE_TRAINING])
        folder = str(random.choice(list(CLASSES)))
        look = random_look(random)
        picture = self._transform(render(draw(folder, random), look, random))
        caption = _caption(CLASSES[folder], look, random)
        return picture, open_clip.tokenize([caption], CONFIG["text_cfg"]["context_length"])[0]


def train(seed: int, steps: int) -> torch.nn.Module:
    """A model after `steps` batches; on one thread, so that the sums are always added in one order."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model: Any = open_clip.CLIP(**CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(_groups(model), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    loader = DataLoader(CaptionedDrawings(seed, steps * BATCH), BATCH, num_workers=1, prefetch_factor=8)
    began = time.monotonic()
    for step, (pictures, tokens) in enumerate(loader, 1):
        images, texts, scale = model(pictures.contiguous(memory_format=torch.channels_last), tokens)
        logits, diagonal = scale * images @ texts.T, torch.arange(len(images))
        loss = (cross_entropy(logits, diagonal) + cross_entropy(logits.T, diagonal)) / 2
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE)
        if step % 100 == 0:
            print(f"step {step} of {steps}, {time.monotonic() - began:.0f} s, loss {loss.item():.3f}", flush=True)
    return model.eval()  # type: ignore[no-any-return]


def write(model: torch.nn.Module, folder: Path) -> None:
    """Write the open_clip config and the weights, in fp16, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    halved = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    save_file({key: value.contiguous() for key, value in halved.items()}, folder / f"{NAME}.safetensors")


def _caption(phrase: str, look: Look, random: np.random.Generator) -> str:
    """What is seen, sometimes with the stain's colour and what is wrong with the picture."""
    picture = str(random.choice(PICTURES))
    article, noun = picture.split(" ", 1)
    faults = [word for word, present in (("blurred", look.blur > 0.6), ("grainy", look.noise > 0.04)) if present]
    if faults and random.random() < 0.5:
        article, noun = "a", f"{random.choice(faults)} {noun}"
    caption = str(random.choice(TEMPLATES)).format(picture=f"{article} {noun}", phrase=phrase)
    return f"{caption}, stained {_colour(look)}" if random.random() < 0.5 else caption


def _colour(look: Look) -> str:
    """The name of what the bodies let through."""
    light = np.exp(-np.array(look.body))
    span = (light - light.min()) / max(float(light.max() - light.min()), 1e-6)
    return min(COLOURS, key=lambda name: float(np.square(span - COLOURS[name]).sum()))


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Gains, biases and the temperature are not decayed, as in the paper."""
    matrices = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def _rate(step: int, steps: int) -> float:
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + float(np.cos(np.pi * (step - WARM_UP) / max(1, steps - WARM_UP))))


def main() -> None:
    """Read the command line, train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=OUT, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    write(train(options.seed, options.steps), options.folder)
    print(f"wrote {NAME}.json and {NAME}.safetensors to {options.folder}")


if __name__ == "__main__":
    main()
