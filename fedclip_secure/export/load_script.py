"""How an exported adapter is loaded by a stranger: a program in plain torch, open_clip and safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from fedclip_secure.config.lock import Contract, OpenClipEncoder, TimmEncoder
from fedclip_secure.config.plan import SHIPPED, OpenClipModel
from fedclip_secure.export.encoder_examples import example_of
from fedclip_secure.export.examples import EXTERNAL, TEXT_FEATURES

_BUILT = "encoder"  # under this name open_clip builds a config that is not its own: encoder.json

_FILES = (
    'card, adapter = json.load(open("adapter.json", encoding="utf-8")), load_file("adapter.safetensors")',
    'classes, scale = card["classes"], card["encoder"]["logit_scale"]',
)
_PROMPTS = 'prompts = [[t.replace("{}", phrase) for t in card["templates"]] for phrase in classes.values()]'


def encoder_config(contract: Contract) -> str | None:
    """The encoder's open_clip config as JSON, where open_clip itself has none by that name: encoder.json."""
    encoder, model = contract.lock.encoder, contract.plan.model
    built = isinstance(encoder, OpenClipEncoder) and isinstance(model, OpenClipModel) and _name(model) == _BUILT
    return encoder.config if built and isinstance(encoder, OpenClipEncoder) else None


def weights_name(model: OpenClipModel) -> str:
    """What open_clip is told as `pretrained`: a tag, or a file beside the adapter."""
    return f"{SHIPPED}.safetensors" if model.name == SHIPPED else model.pretrained.rsplit("/", 1)[-1]


def loading(contract: Contract) -> str:
    """The card's section about it, in Markdown; says where there is no such program for the method and its encoder."""
    lines = example_of(contract.plan.method)
    if lines is None or isinstance(contract.lock.encoder, TimmEncoder):
        return (
            "This method's adapter is applied by fedclip-secure, `fedclip-silo predict`; the equations stand in its "
            "package `fedclip_secure.methods`."
        )
    encoder, model = contract.lock.encoder, contract.plan.model
    if isinstance(encoder, OpenClipEncoder) and isinstance(model, OpenClipModel):
        needs, program = _what_images_need(encoder, model), _for_images(lines, encoder, model)
    else:
        needs, program = _what_features_need(encoder.dim), _for_features(lines)
    return "\n".join([needs, "", "```python", *program, "```"])


def _for_images(lines: tuple[str, ...], encoder: OpenClipEncoder, model: OpenClipModel) -> list[str]:
    name, look, applied = _name(model), encoder.preprocessing, _applied(lines)
    reads_text = any("tokenizer(" in line for line in applied)
    return [
        *_imports(applied, "json", "sys", "open_clip"),
        *_FILES,
        *([f'open_clip.add_model_config("{name}.json")'] if name == _BUILT else []),
        f"model = open_clip.create_model({_quoted(name)}, pretrained={_quoted(weights_name(model))}).eval()",
        f"transform = open_clip.image_transform({look.size}, is_train=False, mean={tuple(look.mean)}, "
        f'std={tuple(look.std)}, interpolation="{look.interpolation}", resize_mode="{look.resize_mode}")',
        *([f"tokenizer = open_clip.get_tokenizer({_quoted(name)})"] if reads_text else []),
        *([_PROMPTS] if TEXT_FEATURES in lines else []),
        'pictures = (ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in sys.argv[1:])',
        "images = torch.stack(list(map(transform, pictures)))",
        *applied,
        "for path, row in zip(sys.argv[1:], logits):",
        '    print(path, list(classes)[row.argmax()], f"{row.softmax(0).max():.4f}")',
    ]


def _for_features(lines: tuple[str, ...]) -> list[str]:
    applied = _applied(EXTERNAL.get(line, line) for line in lines)
    return [
        *_imports(applied, "json", "sys"),
        *_FILES,
        *applied,
        "for row in logits:",
        '    print(list(classes)[row.argmax()], f"{row.softmax(0).max():.4f}")',
    ]


def _imports(applied: list[str], *always: str) -> list[str]:
    """What the lines need, and what every such program does."""
    text = "\n".join(applied)

    def used(*names: str) -> str:
        return ", ".join(name for name in names if name in always or re.search(rf"\b{name}[.(]", text))

    return [
        f"import {used('hashlib', 'json', 'sys')}",
        f"import {used('numpy', 'open_clip', 'torch')}",
        *(["from PIL import Image, ImageOps"] if "open_clip" in always else []),
        "from safetensors.torch import load_file",
        f"from torch.nn.functional import {used('linear', 'normalize', 'pad')}",
        "",
    ]


def _applied(blocks: Iterable[str]) -> list[str]:
    return ["with torch.no_grad():", *(f"    {line}" for block in blocks for line in block.split("\n"))]


def _what_images_need(encoder: OpenClipEncoder, model: OpenClipModel) -> str:
    where = "in this folder" if model.name == SHIPPED else "a tag that open_clip downloads, or a file to put here"
    of_hugging_face = model.tokenizer is not None or "hf_tokenizer_name" in encoder.config
    said = (
        f"With `pip install open_clip_torch pillow safetensors{' transformers' * of_hugging_face}`, run in this "
        "folder, with images as arguments. The "
        f"encoder's weights are {plain(weights_name(model))}, {where}; the file's SHA-256 is {encoder.weights_sha256}. "
        "Transparent pixels must have been made white."
    )
    if model.image_window is None:
        return said
    return f"{said} Grey values of more than 8 bits must have been mapped from {list(model.image_window)} to 0..255."


def _what_features_need(dim: int) -> str:
    return (
        "With `pip install numpy torch safetensors`, run in this folder, with a safetensors file as argument whose "
        f"array `features` (N, {dim}) holds raw features, not normalised, of the encoder that the silos used."
    )


def plain(text: str) -> str:
    """Text that no reader of Markdown takes for a link, a picture, HTML or a new cell: names are the coordinator's."""
    return re.sub(r"[\\`<>|]|\](?=[(\[:])", r"\\\g<0>", text)


def _quoted(text: str) -> str:
    """A string of the program: names are the coordinator's, and must not become code."""
    return json.dumps(text)


def _name(model: OpenClipModel) -> str:
    return model.name if model.config is None and model.name != SHIPPED else _BUILT
