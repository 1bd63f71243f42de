"""The published variants as data: sizes, accuracies, checkpoints and their license.

Sources: official `models/gc_vit.py` and its README (May 2023 weights); GFLOPs from the
paper, Hatamizadeh et al. 2023. Sizes are bytes; a `None` is not published. "crop" is the
share of a photograph's sides that the evaluation looks at (timm's `default_cfg`; see
`gcvit.images.center_box`).
"""

RELEASE_LICENSE = "CC-BY-NC-SA-4.0"
"""License of the ImageNet weights: not for commercial use. The code that reads them is free."""

TINY_IMAGENET_TERMS = "non-commercial research and education"
"""What ImageNet's images may be used for, and so what was trained on them."""


def _config(
    embed_dim,
    depths,
    heads,
    mlp_ratio,
    path_drop,
    layer_scale=None,
    window_size=(7, 7, 14, 7),
    **more,
):
    """Return constructor arguments; `heads` are those of the first level, doubled from there."""
    return {
        "window_size": window_size,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": tuple(heads * 2**i for i in range(4)),
        "mlp_ratio": mlp_ratio,
        "path_drop": path_drop,
        "layer_scale": layer_scale,
        **more,
    }


def _preset(
    config,
    weights,
    image_size=224,
    parameters=None,
    top1=None,
    gflops=None,
    license=RELEASE_LICENSE,
    crop=0.875,
):
    return {
        "config": config,
        "image_size": image_size,
        "crop": crop,
        "parameters": parameters,
        "top1": top1,
        "gflops": gflops,
        "license": license,
        "weights": weights,
    }


def _remote(url, size=None, sha256=None, name=None, **more):
    return {
        "url": url,
        "name": name or url.rsplit("/", 1)[-1],
        "size": size,
        "sha256": sha256,
        **more,
    }


def _official(name, sha256=None, **more):
    url = f"https://huggingface.co/nvidia/GCViT/resolve/main/{name}.pth.tar"
    return _remote(url, sha256=sha256, **more)


def _timm(variant):
    # Each of timm's files is called model.safetensors: in the cache it bears the variant's name.
    name = f"gcvit_{variant}.in1k"
    url = f"https://huggingface.co/timm/{name}/resolve/main/model.safetensors"
    return _remote(url, name=f"{name}.safetensors")


_LARGE = (192, (3, 4, 19, 5), 6, 2.0, 0.5, 1e-5)

PRESETS = {
    "gcvit_xxtiny": _preset(
        _config(64, (2, 2, 6, 2), 2, 3.0, 0.2),
        parameters=11_995_428,
        top1=79.9,
        gflops=2.1,
        weights={
            "imagenet": _remote(
                "https://github.com/awsaf49/gcvit-tf/releases/download/v1.1.6/gcvitxxtiny.keras",
                size=48_767_519,
            ),
            "official": _official("gcvit_1k_xxtiny"),
            "timm": _timm("xxtiny"),
        },
    ),
    "gcvit_xtiny": _preset(
        _config(64, (3, 4, 6, 5), 2, 3.0, 0.2),
        parameters=19_981_294,
        top1=82.0,
        gflops=2.6,
        weights={
            "official": _official(
                "gcvit_1k_xtiny",
                "d7754bac609e72e3381d6c2455424ba266bd295924eaa787188a4be40f7d394f",
            ),
            "timm": _timm("xtiny"),
        },
    ),
    "gcvit_tiny": _preset(
        _config(64, (3, 4, 19, 5), 2, 3.0, 0.2),
        parameters=28_221_974,
        top1=83.5,
        gflops=4.7,
        weights={
            "official": _official(
                "gcvit_1k_tiny",
                "30ac1c312765a6fea8fff75d7e15b18f675d923f8c1af041d226041865add8b7",
            ),
            "timm": _timm("tiny"),
        },
    ),
    "gcvit_tiny2": _preset(
        _config(64, (3, 4, 29, 5), 2, 3.0, 0.25),
        parameters=34_535_654,
        top1=83.7,
        gflops=5.5,
        weights={
            "official": _official(
                "gcvit_1k_tiny2",
                "aed13457a55f56a6f8107598ab255dc86576417361e6518553447438e136e4c5",
            ),
        },
    ),
    "gcvit_small": _preset(
        _config(96, (3, 4, 19, 5), 3, 2.0, 0.3, 1e-5),
        parameters=51_092_173,
        top1=84.3,
        gflops=8.5,
        weights={"official": _official("gcvit_1k_small"), "timm": _timm("small")},
    ),
    "gcvit_small2": _preset(
        _config(96, (3, 4, 23, 5), 3, 3.0, 0.35, 1e-5),
        parameters=68_615_197,
        top1=84.8,
        gflops=10.7,
        weights={
            "official": _official(
                "gcvit_1k_small2",
                "2252d049e127dcbb4d97e641c6fc345c8304e0e0bff6e2243065554826e52f60",
            ),
        },
    ),
    "gcvit_base": _preset(
        _config(128, (3, 4, 19, 5), 4, 2.0, 0.5, 1e-5),
        parameters=90_320_836,
        top1=85.0,
        gflops=14.8,
        weights={
            "official": _official(
                "gcvit_1k_base",
                "068b5af7c13234fe3cbee7f4e5a622d1545a706d92bdb6bf69cd0f922aa444ec",
            ),
            "timm": _timm("base"),
        },
    ),
    "gcvit_large": _preset(
        _config(*_LARGE),
        parameters=202_075_570,
        top1=85.7,
        gflops=32.6,
        weights={
            "official": _official(
                "gcvit_1k_large",
                "180dabb77950bf2f8a778fc947d6cbf21a21e2cd14af4751b6ce3862c01e36ba",
            ),
            # Of these weights, top-1 is another one than the preset's.
            "official_21k": _official("gcvit_21k_large_224", top1=86.6),
        },
    ),
    "gcvit_large_384": _preset(
        _config(*_LARGE, window_size=(12, 12, 24, 12)),
        image_size=384,
        parameters=202_860_610,
        top1=87.4,
        weights={"official_21k": _official("gcvit_21k_large_384")},
    ),
    "gcvit_large_512": _preset(
        _config(*_LARGE, window_size=(16, 16, 32, 16)),
        image_size=512,
        parameters=203_795_362,
        top1=87.6,
        weights={"official_21k": _official("gcvit_21k_large_512")},
    ),
    "gcvit_nano": _preset(
        _config(24, (2, 2, 6, 2), 2, 3.0, 0.1, window_size=(4, 4, 8, 4), num_classes=200),
        image_size=128,
        crop=1.0,
        parameters=1_673_236,
        license=TINY_IMAGENET_TERMS,
        # Trained by tools/reproduce/train_nano.py on Tiny ImageNet.
        weights={
            "tiny_imagenet": {
                "file": "gcvit_nano-tiny_imagenet.safetensors",
                "size": 3_376_600,
                "sha256": "27333867141ccb6a325d529c4778e92c50af34247a3360ebdd245fa450ae393f",
            },
        },
    ),
}
"""The published variants by name, and `gcvit_nano`, which ships; imported as `gcvit.PRESETS`.

Each is a dict: "config" holds the arguments of `GCViT`, "image_size" the side in pixels that it
was trained at, "crop" the share of a photograph's sides that an evaluation looks at, "parameters",
"top1" (percent on ImageNet) and "gflops" what was published (`None` where it was not), "license"
that of the weights, and "weights" a dict from a name to where a checkpoint is.
"""
