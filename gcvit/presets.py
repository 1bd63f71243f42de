"""The published variants as data: sizes, accuracies, checkpoints and their licence.

Sources: official `models/gc_vit.py` and its README (May 2023 weights); GFLOPs from the
paper, Hatamizadeh et al. 2023. Sizes are bytes; a `None` is not published.
"""

RELEASE_LICENSE = "CC-BY-NC-SA-4.0"
"""Licence of the ImageNet weights: not for commercial use. The code that reads them is free."""

_OFFICIAL = "https://huggingface.co/nvidia/GCViT/resolve/main/{}.pth.tar"
_TIMM = "https://huggingface.co/timm/gcvit_{}.in1k/resolve/main/model.safetensors"


def _variant(
    embed_dim, depths, heads, mlp_ratio, path_drop, layer_scale, parameters, top1, gflops, **more
):
    return {
        "config": {
            "window_size": (7, 7, 14, 7),
            "embed_dim": embed_dim,
            "depths": depths,
            "num_heads": tuple(heads * 2**i for i in range(4)),
            "mlp_ratio": mlp_ratio,
            "path_drop": path_drop,
            "layer_scale": layer_scale,
        },
        "image_size": 224,
        "parameters": parameters,
        "top1": top1,
        "gflops": gflops,
        "license": RELEASE_LICENSE,
        "weights": {},
    } | more


def _official(name, sha256=None):
    return {"format": "official", "url": _OFFICIAL.format(name), "size": None, "sha256": sha256}


def _timm(name):
    return {"format": "timm", "url": _TIMM.format(name), "size": None, "sha256": None}


PRESETS = {
    "gcvit_xxtiny": _variant(
        64,
        (2, 2, 6, 2),
        2,
        3.0,
        0.2,
        None,
        11_995_428,
        79.9,
        2.1,
        weights={
            "imagenet": {
                "format": "release",
                "url": "https://github.com/awsaf49/gcvit-tf/releases/download/v1.1.6/"
                "gcvitxxtiny.keras",
                "size": 48_767_519,
                "sha256": None,
            },
            "official": _official("gcvit_1k_xxtiny"),
            "timm": _timm("xxtiny"),
        },
    ),
    "gcvit_xtiny": _variant(
        64,
        (3, 4, 6, 5),
        2,
        3.0,
        0.2,
        None,
        19_981_294,
        82.0,
        2.6,
        weights={
            "official": _official(
                "gcvit_1k_xtiny",
                "d7754bac609e72e3381d6c2455424ba266bd295924eaa787188a4be40f7d394f",
            ),
            "timm": _timm("xtiny"),
        },
    ),
    "gcvit_tiny": _variant(
        64,
        (3, 4, 19, 5),
        2,
        3.0,
        0.2,
        None,
        28_221_974,
        83.5,
        4.7,
        weights={
            "official": _official(
                "gcvit_1k_tiny",
                "30ac1c312765a6fea8fff75d7e15b18f675d923f8c1af041d226041865add8b7",
            ),
            "timm": _timm("tiny"),
        },
    ),
    "gcvit_tiny2": _variant(
        64,
        (3, 4, 29, 5),
        2,
        3.0,
        0.25,
        None,
        None,
        83.7,
        5.5,
        weights={
            "official": _official(
                "gcvit_1k_tiny2",
                "aed13457a55f56a6f8107598ab255dc86576417361e6518553447438e136e4c5",
            ),
        },
    ),
    "gcvit_small": _variant(
        96,
        (3, 4, 19, 5),
        3,
        2.0,
        0.3,
        1e-5,
        51_092_173,
        84.3,
        8.5,
        weights={"official": _official("gcvit_1k_small"), "timm": _timm("small")},
    ),
    "gcvit_small2": _variant(
        96,
        (3, 4, 23, 5),
        3,
        3.0,
        0.35,
        1e-5,
        None,
        84.8,
        10.7,
        weights={
            "official": _official(
                "gcvit_1k_small2",
                "2252d049e127dcbb4d97e641c6fc345c8304e0e0bff6e2243065554826e52f60",
            ),
        },
    ),
    "gcvit_base": _variant(
        128,
        (3, 4, 19, 5),
        4,
        2.0,
        0.5,
        1e-5,
        90_320_836,
        85.0,
        14.8,
        weights={
            "official": _official(
                "gcvit_1k_base",
                "068b5af7c13234fe3cbee7f4e5a622d1545a706d92bdb6bf69cd0f922aa444ec",
            ),
            "timm": _timm("base"),
        },
    ),
    "gcvit_large": _variant(
        192,
        (3, 4, 19, 5),
        6,
        2.0,
        0.5,
        1e-5,
        202_075_570,
        85.7,
        32.6,
        weights={
            "official": _official(
                "gcvit_1k_large",
                "180dabb77950bf2f8a778fc947d6cbf21a21e2cd14af4751b6ce3862c01e36ba",
            ),
            "official_21k": _official("gcvit_21k_large_224"),
        },
    ),
}
PRESETS["gcvit_large_384"] = _variant(
    192,
    (3, 4, 19, 5),
    6,
    2.0,
    0.5,
    1e-5,
    None,
    87.4,
    None,
    image_size=384,
    weights={"official_21k": _official("gcvit_21k_large_384")},
)
PRESETS["gcvit_large_384"]["config"]["window_size"] = (12, 12, 24, 12)
PRESETS["gcvit_large_512"] = _variant(
    192,
    (3, 4, 19, 5),
    6,
    2.0,
    0.5,
    1e-5,
    None,
    87.6,
    None,
    image_size=512,
    weights={"official_21k": _official("gcvit_21k_large_512")},
)
PRESETS["gcvit_large_512"]["config"]["window_size"] = (16, 16, 32, 16)
PRESETS["gcvit_nano"] = _variant(
    24,
    (2, 2, 6, 2),
    1,
    3.0,
    0.1,
    None,
    None,
    None,
    None,
    image_size=128,
    license="MIT",
    # Trained by tools/train_nano.py on the training split of tf_flowers.
    weights={
        "flowers": {
            "format": "official",
            "file": "gcvit_nano-flowers.safetensors",
            "size": 3_294_546,
            "sha256": "2efd5971b9d485b2e160c55267175d4837f08f7a7af66b0dacc61cc7d5001c72",
        },
    },
)
PRESETS["gcvit_nano"]["config"].update(
    window_size=(4, 4, 8, 4), num_heads=(2, 4, 8, 16), num_classes=5
)
