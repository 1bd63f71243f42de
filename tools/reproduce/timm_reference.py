"""Run every variant through timm as well, and write down how far the numbers are apart.

    python tools/reproduce/timm_reference.py

Needs timm and PyTorch. Writes gcvit/results/timm.json: for gcvit_nano, what timm computes
from the checkpoint that ships, so that chapter 13 can compare without timm; for each preset,
the largest difference between the logits, with random weights that let every part of the
model show in them.
"""

import argparse
import functools
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")  # beside TensorFlow, PyTorch's triton crashes

import keras
import numpy as np
import torch
from results import versions
from safetensors.torch import load_file
from torchvision_stand_in import import_timm

from gcvit import PRESETS, GCViT, explain
from gcvit.images import normalize
from gcvit.weights import save_safetensors, weight_specs

RESULTS = Path(__file__).resolve().parents[2] / "gcvit" / "results" / "timm.json"


def randomize(model, seed):
    """Give a model weights of a size that makes each of them matter in the logits."""
    draw = np.random.default_rng(seed)
    for spec in weight_specs(model):
        shape, name = tuple(spec.variable.shape), spec.names["official"].rsplit(".", 1)[-1]
        values = draw.normal(size=shape)
        if len(shape) > 1 and spec.kind != "table":  # keep the size of what passes through
            fan_in = np.prod(shape[:2]) if spec.kind == "depthwise" else np.prod(shape[:-1])
            values = values / fan_in**0.5
        elif name.startswith("gamma"):
            values = 0.5 + 0.2 * values
        elif name == "weight":
            values = 1 + 0.2 * values
        else:
            values = 0.3 * values
        spec.variable.assign(values.astype("float32"))


def in_timm(model, image_size):
    """Return timm's model of the same sizes, with the same weights."""
    # timm rounds the hidden units of squeeze-and-excite up to a multiple of eight, which
    # changes no published variant, but gcvit_nano.
    timm = import_timm()
    squeeze_excite = functools.partial(timm.layers.SqueezeExcite, rd_divisor=1)
    timm.models.gcvit.get_attn = lambda name: squeeze_excite
    twin = timm.models.gcvit.GlobalContextVit(
        img_size=image_size,
        window_size=model.window_size,
        embed_dim=model.embed_dim,
        depths=model.depths,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        layer_scale=model.layer_scale,
        num_classes=model.num_classes,
    )
    with tempfile.TemporaryDirectory() as folder:
        save_safetensors(model, f"{folder}/m.safetensors", naming="timm")
        state = load_file(f"{folder}/m.safetensors")
    result = twin.load_state_dict(state, strict=False)
    # What is not a weight: the index of the position tables.
    assert not result.unexpected_keys, result.unexpected_keys
    assert all(key.endswith("relative_position_index") for key in result.missing_keys)
    return twin.eval()


def logits_of_both(model, image_size):
    """Return (ours, timm's) logits for the photograph, and timm's maps of the stages."""
    images = normalize(explain.photograph(image_size))[None].astype("float32")
    twin = in_timm(model, image_size)
    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        maps = []
        handles = [s.register_forward_hook(lambda *a: maps.append(a[2])) for s in twin.stages]
        theirs = twin(x).numpy()
        for handle in handles:
            handle.remove()
    ours = keras.ops.convert_to_numpy(model(images))
    return ours, theirs, [m.permute(0, 2, 3, 1).numpy() for m in maps]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", action="append", choices=list(PRESETS), help="default: all")
    arguments = parser.parse_args()
    results = {
        "command": "python tools/reproduce/timm_reference.py",
        "versions": versions(("timm", "torch", "keras")),
        "backend": keras.backend.backend(),
        "variants": {},
    }
    model = GCViT.from_preset("gcvit_nano", "flowers", head_activation=None)
    ours, theirs, maps = logits_of_both(model, 128)
    results["gcvit_nano"] = {
        "image": "skimage.data.chelsea(), gcvit.explain.photograph(128)",
        "logits": theirs[0].astype(float).tolist(),
        # The values of the token in the middle, which is less than the map and tells as much.
        "middle": {
            f"stage_{i}": m[0, m.shape[1] // 2, m.shape[2] // 2].astype(float).tolist()
            for i, m in enumerate(maps)
        },
    }
    print(f"gcvit_nano, trained: {np.abs(ours - theirs).max():.1e}", flush=True)
    for name in arguments.preset or PRESETS:
        preset = PRESETS[name]
        model = GCViT.from_preset(name, weights=None, head_activation=None)
        randomize(model, seed=0)
        ours, theirs, _ = logits_of_both(model, preset["image_size"])
        results["variants"][name] = {
            "image_size": preset["image_size"],
            "mean_logit": float(np.abs(theirs).mean()),
            "largest_difference": float(np.abs(ours - theirs).max()),
        }
        print(name, results["variants"][name], flush=True)
        del model
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
