"""Write a small CLIP with random weights: `python tools/random_tower.py OUT_DIR [--seed 0]`.

It stands in for weights from a hub, in tests and in a first walk through the program. It has
learned nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

NAME = "tower"
CONFIG = {
    "embed_dim": 64,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16},
    # The vocabulary is the tokenizer's, so a narrow text tower keeps the whole at a million parameters.
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def write_random_tower(folder: Path, seed: int = 0) -> None:
    """Write `tower.json` (open_clip config) and `tower.safetensors` (weights, decided by `seed`) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**CONFIG)
    save_file(model.state_dict(), folder / f"{NAME}.safetensors")


def main() -> None:
    """Read the command line and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_random_tower(options.folder, options.seed)
    print(f"wrote {NAME}.json and {NAME}.safetensors to {options.folder}")


if __name__ == "__main__":
    main()
