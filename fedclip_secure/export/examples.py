"""How each method's adapter is applied, in plain torch: the lines that stand in an exported adapter's card.

They are text, because a coordinator exports too and has no torch. Before them are defined `adapter` (named tensors),
`card` (adapter.json), `classes` (name: phrase), `scale` (CLIP's logit scale) and, unless the encoder is external,
`model` and `tokenizer` (open_clip), `images` (N, 3, S, S) and `prompts` (lists of a class's prompts). They end with
`logits` (N, C). Here are the methods on features, which take any encoder's; those inside of one are in
`encoder_examples.py`.
"""

from __future__ import annotations

IMAGE_FEATURES = "image_features = model.encode_image(images)"
TEXT_FEATURES = (
    "texts = [normalize(model.encode_text(tokenizer(lines)), dim=-1).mean(dim=0) for lines in prompts]\n"
    "text_features = normalize(torch.stack(texts), dim=-1)"
)
# The same where features come from an encoder that open_clip does not build.
EXTERNAL = {
    IMAGE_FEATURES: 'image_features = load_file(sys.argv[1])["features"]  # your encoder\'s, (N, D), not normalised',
    TEXT_FEATURES: 'text_features = load_file("text_features.safetensors")["text_features"]',
}
BY_TEXT = "logits = scale * normalize(image_features, dim=-1) @ text_features.T"

_LINEAR = (
    IMAGE_FEATURES,
    'logits = scale * linear(normalize(image_features, dim=-1), adapter["weight"], adapter["bias"])',
)
_DISCRIMINANT = """\
# The equations at the head of fedclip-secure's methods/discriminant.py: features with random ones beside them,
dim, (count, width) = image_features.shape[1], adapter["classes.weight"].shape
stream = hashlib.shake_256(b"fedclip-secure/v1/discriminant").digest(((width - dim) * dim + 7) // 8)
bits = numpy.unpackbits(numpy.frombuffer(stream, numpy.uint8))[: (width - dim) * dim]
signs = torch.from_numpy(2.0 * bits - 1).reshape(width - dim, dim)
x = normalize(image_features.double(), dim=-1)
lifted = torch.cat([x, normalize(torch.relu(x @ signs.T), dim=-1) / 2], dim=-1)
# the sums, their noise and the spread of a class,
counts = adapter["classes.bias"].double().clamp(min=1 / count)[:, None]
sums, moments, records = adapter["classes.weight"].double(), adapter["moments.weight"].double(), counts.sum()
noise = (moments - moments.T).square().sum() / (2 * width * (width - 1))
moments = (moments + moments.T) / 2
found = moments.trace() - ((sums.square().sum(dim=1, keepdim=True) - noise * width) / counts).sum()
spread = found.clamp(min=1) / records
# where each class lies,
text = pad(text_features.double(), (0, width - dim))
centre, offsets = sums.sum(dim=0) / records, text - (counts * text).sum(dim=0) / records
fit = ((sums - counts * centre) * offsets).sum() / (counts * offsets.square()).sum().clamp(min=1e-12)
worth = 3 * (1 + noise * width / (counts * spread))
means = (worth * (centre + fit * offsets) + sums) / (worth + counts)
# and the precision of what lies around it.
within = moments - means.T @ sums - sums.T @ means + (counts * means).T @ means
values, vectors = torch.linalg.eigh(within)
small = values < (2 * width * noise) ** 0.5
values[small] = (values[small].sum() / small.sum().clamp(min=1)).clamp(min=0)
precision = ((records - 1).clamp(min=0) + 0.03 * spread * scale) / (values + 0.03 * spread)
weight = (means @ vectors * precision) @ vectors.T
logits = lifted @ weight.T - (means * weight).sum(dim=1) / 2"""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "fedclip": (
        TEXT_FEATURES,
        IMAGE_FEATURES,
        'hidden = torch.tanh(linear(image_features, adapter["hidden.weight"], adapter["hidden.bias"]))',
        'attention = torch.softmax(linear(hidden, adapter["gate.weight"], adapter["gate.bias"]), dim=-1)',
        "logits = scale * normalize(attention * image_features, dim=-1) @ text_features.T",
    ),
    "linear_probe": _LINEAR,
    "fedtune:head": _LINEAR,
    "private_prototypes": (
        IMAGE_FEATURES,
        'logits = scale * linear(normalize(image_features, dim=-1), normalize(adapter["weight"], dim=-1))',
    ),
    "discriminant": (TEXT_FEATURES, IMAGE_FEATURES, _DISCRIMINANT),
    "feddat": (
        TEXT_FEATURES,
        IMAGE_FEATURES,
        'hidden = torch.relu(linear(image_features, adapter["shared.0.down.weight"], adapter["shared.0.down.bias"]))',
        'image_features = image_features + linear(hidden, adapter["shared.0.up.weight"], adapter["shared.0.up.bias"])',
        BY_TEXT,
    ),
}
