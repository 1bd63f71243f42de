"""Chapter 2: from pixels to the first tokens."""

import keras
from keras import layers

from gcvit.checks import feature_map_shape, positive_whole
from gcvit.unit_blocks import ReduceSize, convolution, halved


@keras.saving.register_keras_serializable(package="gcvit")
class PatchEmbed(layers.Layer):
    """Turn an image into a map of overlapping patch embeddings. The paper calls it the stem.

    A 3x3 convolution with stride 2, then a `ReduceSize` that keeps the channels.

    Shapes: (batch, height, width, colors) in, (batch, ⌈height/4⌉, ⌈width/4⌉,
    `embed_dim`) out.

    Args:
        embed_dim: channels of an embedding.

    Raises:
        ValueError: for an input that is not (batch, height, width, colors).

    Source: paper, section 3; official `gc_vit.py`, `PatchEmbed`.
    """

    def __init__(self, embed_dim, **kwargs):
        super().__init__(**kwargs)
        self.embed_dim = positive_whole("embed_dim", embed_dim)
        dtype = self.dtype_policy
        self.proj = convolution(embed_dim, 3, strides=2, pad=1, dtype=dtype, name="proj")
        self.conv_down = ReduceSize(keepdims=True, dtype=dtype, name="conv_down")

    def build(self, input_shape):
        feature_map_shape(self, input_shape)
        self.proj.build(input_shape)
        self.conv_down.build(halved(input_shape, self.embed_dim))

    def call(self, x):
        return self.conv_down(self.proj(x))

    def compute_output_shape(self, input_shape):
        return halved(halved(input_shape, self.embed_dim), self.embed_dim)

    def get_config(self):
        return {**super().get_config(), "embed_dim": self.embed_dim}
