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


class _Switched:
    """Stands for the laboratory's model, which a saved model can name, until it is asked for.

    Its module imports TensorFlow and SciPy, which to read a model should not.
    """

    @staticmethod
    def from_config(config):
        return importlib.import_module("gcvit.laboratory").Switched.from_config(config)


keras.saving.get_custom_objects()["gcvit>Switched"] = _Switched
