"""The same lines as in `examples.py`, of the methods that train inside the encoder: each changes `model` by itself.

A feddat or fedapt whose options make other lines of it has a name of its own here: `example_of` chooses.
"""

from __future__ import annotations

from fedclip_secure.config.plan import MethodPlan
from fedclip_secure.export.examples import BY_TEXT, EXAMPLES, IMAGE_FEATURES, TEXT_FEATURES

_BLOCKS = 'blocks = model.visual.trunk.blocks if hasattr(model.visual, "trunk") else model.visual.transformer.resblocks'

_VISUAL = """\
for name, value in adapter.items():
    model.visual.get_parameter(name.removeprefix("visual.tower.vit.")).copy_(value)"""
_TEXT = """\
for name, value in adapter.items():
    getattr(model, "text", model).get_parameter(name.removeprefix("tower.")).copy_(value)"""
_ALL = """\
for name, value in adapter.items():
    model.get_parameter(name.removeprefix("inner.clip.")).copy_(value)
scale = model.logit_scale.exp().clamp(max=1000)"""

# The rows of a joint projection are those of the queries, the keys and the values.
_LOW_RANK = """\
for name in adapter:
    if name.endswith(".a"):
        query, value = adapter[f"{name[:-1]}b"] @ adapter[name]
        joint = name.removeprefix("visual.tower.vit.").removesuffix(".0.a").replace(".parametrizations.", ".")
        model.visual.get_parameter(joint).add_(torch.cat([query, torch.zeros_like(query), value]))"""

_PROMPT = """\
prompt, first = adapter["visual.prompts.tokens"][0], card["method"].get("first_block", 0)
def append(block, taken):
    return torch.cat([taken[0], prompt.expand(len(taken[0]), -1, -1)], dim=1)
def remove(block, taken, hidden):
    return hidden[:, : -len(prompt)]
blocks[first].register_forward_pre_hook(append)
blocks[-1].register_forward_hook(remove)"""
_PROMPT_OF_EACH = """\
learned = adapter["visual.prompts.tokens"]
for block, prompt in zip(blocks[-len(learned) :], learned):
    def append(block, taken, prompt=prompt):
        return torch.cat([taken[0], prompt.expand(len(taken[0]), -1, -1)], dim=1)
    def remove(block, taken, hidden):
        return hidden[:, : -learned.shape[1]]
    block.register_forward_pre_hook(append)
    block.register_forward_hook(remove)"""

# The tokens in the places of the X are replaced as soon as they are embedded.
_CONTEXT = """\
context = adapter["context"]
def place(layer, taken, embedded):
    embedded[:, 1 : 1 + len(context)] = context
getattr(model, "text", model).token_embedding.register_forward_hook(place)
lines = ["X " * len(context) + f"{phrase}." for phrase in classes.values()]
text_features = normalize(model.encode_text(tokenizer(lines)), dim=-1)"""

_KEYS = """\
prompt, network = adapter["prompt"], adapter["network.weight"]
length, width = prompt.shape[1:]
draws = numpy.random.Generator(numpy.random.PCG64(card["method"].get("seed", 0)))
keys = torch.from_numpy(draws.random((len(network), length, 2048), dtype=numpy.float32)[:, :, :width])
def place(layer, taken, embedded):
    embedded[:, 1 : 1 + length] = prompt + prompt * key
getattr(model, "text", model).token_embedding.register_forward_hook(place)
tokens, texts = tokenizer(["X " * length + f"{phrase}." for phrase in classes.values()]), []"""
_DOMAINS = """\
image_features = normalize(image_features, dim=-1)
domains = linear(image_features, network)"""
_LARGEST = """\
for key in keys:
    texts.append(normalize(model.encode_text(tokens), dim=-1))
text_features = torch.stack(texts)[domains.argmax(dim=-1)]"""
_MIXTURE = """\
centred = domains - domains.mean(dim=1, keepdim=True)
weights = torch.softmax((len(network) - 1) ** 0.5 * normalize(centred, dim=1) / 0.01, dim=1)
for key in torch.einsum("nk,klw->nlw", weights, keys):
    texts.append(normalize(model.encode_text(tokens), dim=-1))
text_features = torch.stack(texts)"""
_EACH_BY_ITS_OWN = 'logits = scale * torch.einsum("nd,ncd->nc", image_features, text_features)'


def _bottlenecks(name: str) -> str:
    """After each of the last blocks, those `name`.0, `name`.1, ... of the adapter."""
    return f"""\
for number, block in enumerate(blocks[-(len(adapter) // 4) :]):
    parts = [adapter[f"{name}.{{number}}.{{part}}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias")]
    def adapt(block, taken, hidden, parts=parts):
        return hidden + linear(torch.relu(linear(hidden, *parts[:2])), *parts[2:])
    block.register_forward_hook(adapt)"""


def _tuned(*change: str) -> tuple[str, ...]:
    """The lines that change the visual tower, and CLIP's logits."""
    return (TEXT_FEATURES, *change, IMAGE_FEATURES, BY_TEXT)


_WHOLE = (_ALL, TEXT_FEATURES, IMAGE_FEATURES, BY_TEXT)
INSIDE: dict[str, tuple[str, ...]] = {
    "fedtune:text_context": (_CONTEXT, IMAGE_FEATURES, BY_TEXT),
    "fedtune:text_bias": (_TEXT, TEXT_FEATURES, IMAGE_FEATURES, BY_TEXT),
    "fedtune:visual_prompt": _tuned(_BLOCKS, _PROMPT),
    "fedtune:visual_prompt_deep": _tuned(_BLOCKS, _PROMPT_OF_EACH),
    "fedtune:adapter": _tuned(_BLOCKS, _bottlenecks("visual.adapters")),
    "fedtune:visual_bias": _tuned(_VISUAL),
    "fedtune:layernorm": _tuned(_VISUAL),
    "fedtune:lora": _tuned(_LOW_RANK),
    "fedtune:full": _WHOLE,
    "fedavg_full": _WHOLE,
    "fedprox_full": _WHOLE,
    "fedapt": (_KEYS, IMAGE_FEATURES, _DOMAINS, _LARGEST, _EACH_BY_ITS_OWN),
    "fedapt:mixture": (_KEYS, IMAGE_FEATURES, _DOMAINS, _MIXTURE, _EACH_BY_ITS_OWN),
    "feddat:blocks": _tuned(_BLOCKS, _bottlenecks("shared")),
}


def example_of(method: MethodPlan) -> tuple[str, ...] | None:
    """The lines for a plan's `method`; None where there are none."""
    name, options = method.name, method.options
    if name == "feddat" and options.get("place") == "blocks":
        name = "feddat:blocks"
    elif name == "fedapt" and options.get("fast") is False:
        name = "fedapt:mixture"
    return {**EXAMPLES, **INSIDE}.get(name)
