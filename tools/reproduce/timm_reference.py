"""Run every variant through timm as well, and write down how far each backend's logits are apart.

    KERAS_BACKEND=torch python tools/reproduce/timm_reference.py --timm   # needs timm
    KERAS_BACKEND=tensorflow python tools/reproduce/timm_reference.py
    KERAS_BACKEND=jax python tools/reproduce/timm_reference.py
    KERAS_BACKEND=torch python tools/reproduce/timm_reference.py

Each preset gets random weights that let every part of the model show in the logits, the same
in every run. The first run keeps timm's logits in gcvit/results/timm.npz, so that a backend is
compared where timm is not installed; and, for the checkpoint that ships, the logits and a piece
of each stage, for chapter 13. The others write what they measure to gcvit/results/timm.json,
which the README's table is made of (`make format`).
"""

import argparse
import functools
import json
import tempfile
from pathlib import Path

import keras
import numpy as np
import results
from keras import ops
from torchvision_stand_in import import_timm

from gcvit import PRESETS, GCViT, explain
from gcvit.images import normalize
from gcvit.weights import save_safetensors, weight_specs

RESULTS = Path(__file__).resolve().parents[2] / "gcvit" / "results"
SHIPPED = "gcvit_nano"


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


def model_and_image(name, weights=None):
    """Return a preset's model, with random weights unless some are named, and a photograph."""
    model = GCViT.from_preset(name, weights, head_activation=None)
    if weights is None:
        randomize(model, seed=0)
    return model, normalize(explain.photograph(PRESETS[name]["image_size"]))[None]


def in_timm(model, image_size):
    """Return timm's model of the same sizes, with the same weights."""
    from safetensors.torch import load_file

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


def timm_outputs(name, weights=None):
    """Return timm's logits for a preset's photograph, and its maps of the stages."""
    import torch

    model, images = model_and_image(name, weights)
    twin, maps = in_timm(model, images.shape[1]), []
    for stage in twin.stages:
        stage.register_forward_hook(lambda *a: maps.append(a[2].permute(0, 2, 3, 1).numpy()))
    with torch.no_grad():
        logits = twin(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    return logits[0], maps


def shipped_outputs():
    """Return what timm computes from the checkpoint that ships, for chapter 13."""
    weights = next(iter(PRESETS[SHIPPED]["weights"]))
    logits, maps = timm_outputs(SHIPPED, weights)
    size = PRESETS[SHIPPED]["image_size"]
    return {
        "weights": weights,
        "image": f"skimage.data.chelsea(), gcvit.explain.photograph({size})",
        "logits": logits.astype(float).tolist(),
        # The values of the token in the middle, which is less than the map and tells as much.
        "middle": {
            f"stage_{i}": m[0, m.shape[1] // 2, m.shape[2] // 2].astype(float).tolist()
            for i, m in enumerate(maps)
        },
    }


def run_timm(names):
    """Compute timm's logits; keep what is there where the same versions made it."""
    names = names or list(PRESETS)
    record = {"hardware": results.hardware(), "versions": results.versions(("timm", "torch"))}
    written = {"timm": record, SHIPPED: shipped_outputs(), "variants": {}, "backends": {}}
    logits, json_file, logits_file = {}, RESULTS / "timm.json", RESULTS / "timm.npz"
    if logits_file.exists():
        before = json.loads(json_file.read_text(encoding="utf-8"))
        if before["timm"] == record:
            written |= {part: before[part] for part in ("variants", "backends")}
            logits = dict(np.load(logits_file))
    for name in names:
        logits[name], _ = timm_outputs(name)
        mean, size = float(np.abs(logits[name]).mean()), PRESETS[name]["image_size"]
        print(f"{name}: mean |logit| {mean:.2f}", flush=True)
        rows = {**written["variants"], name: {"image_size": size, "mean_logit": mean}}
        written["variants"] = {n: rows[n] for n in PRESETS if n in rows}
        np.savez(logits_file, **logits)
        results.write({json_file: json.dumps(written, indent=1) + "\n"})


def run_backend(names):
    """Compare a backend with timm; keep its other rows where the same versions made them."""
    backend = keras.backend.backend()
    record = {
        "hardware": results.hardware(),
        "versions": results.versions(("keras", backend, "numpy")),
    }
    path, logits = RESULTS / "timm.json", np.load(RESULTS / "timm.npz")
    for name in names or logits:
        model, images = model_and_image(name)
        far = float(np.abs(ops.convert_to_numpy(model(images))[0] - logits[name]).max())
        print(f"{name} on {backend}: {far:.1e}", flush=True)
        del model, images
        written = json.loads(path.read_text(encoding="utf-8"))
        before = written["backends"].get(backend, {})
        rows = before.pop("largest_difference", {})
        rows = {**(rows if before == record else {}), name: far}
        rows = {n: rows[n] for n in PRESETS if n in rows}
        written["backends"][backend] = {**record, "largest_difference": rows}
        results.write({path: json.dumps(written, indent=1) + "\n"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timm", action="store_true", help="compute timm's logits")
    parser.add_argument(
        "--preset",
        action="append",
        choices=list(PRESETS),
        help="default: all, or with a backend all whose logits by timm are kept",
    )
    given = parser.parse_args()
    # Beside TensorFlow, PyTorch's triton crashes.
    if given.timm and keras.backend.backend() != "torch":
        parser.error("--timm needs PyTorch alone in its process: set KERAS_BACKEND=torch")
    (run_timm if given.timm else run_backend)(given.preset)


if __name__ == "__main__":
    main()
