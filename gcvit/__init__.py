"""The Global Context Vision Transformer in Keras 3. Each module is a chapter of the book."""

import importlib

import keras

from gcvit.attention import WindowAttention
from gcvit.block import Block, window_partition, window_reverse
from gcvit.fetch import FetchError
from gcvit.global_tokens import FeatureExtraction, GlobalQueryGenerator
from gcvit.level import Level
from gcvit.model import GCViT
from gcvit.presets import PRESETS
from gcvit.readers import CheckpointError
from gcvit.stem import PatchEmbed
from gcvit.unit_blocks import MLP, ReduceSize, SqueezeAndExcitation
from gcvit.weights import load_checkpoint

__all__ = [
    "PRESETS",
    "Block",
    "CheckpointError",
    "FeatureExtraction",
    "FetchError",
    "GCViT",
    "GlobalQueryGenerator",
    "Level",
    "MLP",
    "PatchEmbed",
    "ReduceSize",
    "SqueezeAndExcitation",
    "WindowAttention",
    "load_checkpoint",
    "window_partition",
    "window_reverse",
]


class _Later:
    """Stands for a class that a saved model can name, until its module is imported.

    The modules import TensorFlow or SciPy, which to read a model should not.
    """

    def __init__(self, module, name):
        self.module, self.name = module, name

    def from_config(self, config):
        return getattr(importlib.import_module(self.module), self.name).from_config(config)


for _name, _module in (
    ("LayerwiseAdamW", "gcvit.fine_tuning.recipes"),
    ("Switched", "gcvit.laboratory"),
):
    keras.saving.get_custom_objects()[f"gcvit>{_name}"] = _Later(_module, _name)
