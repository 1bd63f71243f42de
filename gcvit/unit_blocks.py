"""Chapter 1: the small layers that the rest of the model is made of."""

import keras
from keras import layers, ops

from gcvit import fast
from gcvit.checks import feature_map_shape, positive_whole


def run(sublayers, x):
    """Pass `x` through a list of layers, one after the other."""
    for layer in sublayers:
        x = layer(x)
    return x


def dense(units, **options):
    """Make a dense layer whose random weights start as in the official code.

    They are normal, with deviation 0.02. Keras's own start, Glorot's, is seven times as wide
    for the 24 channels of gcvit_nano, and some trainings from there collapse at once.

    Args:
        units: number of outputs.
        **options: see `keras.layers.Dense`.

    Source: official `gc_vit.py`, `GCViT._init_weights`, whose `trunc_normal_` cuts at 100
    deviations.
    """
    start = keras.initializers.RandomNormal(stddev=0.02)
    return fast.Dense(units, kernel_initializer=start, **options)


def convolution(channels, size, **options):
    """Make a convolution whose random weights start as PyTorch's do, and the official code's.

    They are uniform within ±1/√n, for the n numbers that an output is computed from. Biases
    start at zero here; PyTorch draws them from the same interval.

    Args:
        channels: channels out.
        size: side of the window.
        **options: see `gcvit.fast.Conv2D`, whose `pad` adds a border.
    """
    start = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
    return fast.Conv2D(channels, size, kernel_initializer=start, **options)


def fused_mbconv(channels, dtype=None):
    """Make the four layers of the residual branch of a fused MBConv.

    Depthwise 3x3 convolution, GELU, squeeze-and-excitation, 1x1 convolution. The first
    pads its input by one pixel, so that height and width stay. The layers are returned as
    a plain list because the release checkpoint stores a list called `conv` in each layer
    that has them.

    Args:
        channels: channels in and out.
        dtype: dtype policy of the layers; default: Keras's global policy.

    Source: paper, section 3 (downsampler and token generator); official `gc_vit.py`,
    `ReduceSize.conv` and `FeatExtract.conv`.
    """
    # As in `convolution`: an output of a depthwise window is computed from nine numbers.
    start = keras.initializers.RandomUniform(-1 / 3, 1 / 3)
    return [
        fast.DepthwiseConv2D(
            3, pad=1, use_bias=False, depthwise_initializer=start, dtype=dtype, name="conv_0"
        ),
        fast.Activation("gelu", dtype=dtype, name="conv_1"),
        SqueezeAndExcitation(dtype=dtype, name="conv_2"),
        convolution(channels, 1, use_bias=False, dtype=dtype, name="conv_3"),
    ]


def reinit_glorot(model):
    """Draw a model's dense and convolution kernels anew, as Keras's layers do by default.

    In a small model these are several times as wide as the official start. The checkpoint
    that ships was trained from there, and so are the laboratory's models, which learn nothing
    in their few steps from the official one.

    Args:
        model: a built `GCViT`. The seeds are those of its layers' own initializers.
    """
    for layer in model._flatten_layers():
        for name in {"kernel_initializer", "depthwise_initializer"} & set(vars(layer)):
            glorot = keras.initializers.GlorotUniform(getattr(layer, name).seed)
            layer.kernel.assign(glorot(layer.kernel.shape))


def halved(shape, channels):
    """Return the shape of a map with both sides halved, rounding up, and other channels."""
    batch, height, width, _ = shape
    sides = (None if side is None else (side + 1) // 2 for side in (height, width))
    return (batch, *sides, channels)


@keras.saving.register_keras_serializable(package="gcvit")
class SqueezeAndExcitation(layers.Layer):
    """Scale each channel by a gate that is computed from all channels' averages.

    Shapes: (batch, height, width, channels) in, the same out, or `output_dim` gates
    where the input has one channel to broadcast.

    Args:
        output_dim: number of gates; default `None`: one for each input channel.
        expansion: width of the hidden layer as a share of the channels; default 0.25.

    Raises:
        ValueError: for an input that is not a feature map, a hidden layer of no units, or
            gates that cannot be multiplied with the input.

    Source: Hu et al. 2018, equations 2 to 4; official `gc_vit.py`, `SE`.
    """

    def __init__(self, output_dim=None, expansion=0.25, **kwargs):
        super().__init__(**kwargs)
        self.output_dim = output_dim
        self.expansion = expansion

    def build(self, input_shape):
        channels = feature_map_shape(self, input_shape)[-1]
        hidden = int(channels * self.expansion)
        gates = self.output_dim or channels
        if hidden < 1:
            raise ValueError(
                f"SqueezeAndExcitation needs at least one hidden unit; {channels} channels "
                f"times expansion {self.expansion} make {hidden}."
            )
        if channels != gates and channels != 1:
            raise ValueError(
                f"SqueezeAndExcitation multiplies its gates with its input: output_dim must be "
                f"the number of input channels, {channels}; got {gates}."
            )
        dtype = self.dtype_policy
        self.avg_pool = layers.GlobalAveragePooling2D(
            "channels_last", keepdims=True, dtype=dtype, name="avg_pool"
        )
        self.fc = [
            dense(hidden, use_bias=False, dtype=dtype, name="fc_0"),
            layers.Activation("gelu", dtype=dtype, name="fc_1"),
            dense(gates, use_bias=False, dtype=dtype, name="fc_2"),
            layers.Activation("sigmoid", dtype=dtype, name="fc_3"),
        ]
        self.avg_pool.build(input_shape)
        for layer, units in zip(self.fc, (channels, hidden, hidden, gates), strict=True):
            layer.build((input_shape[0], 1, 1, units))

    def gates(self, x):
        """Return the gates, (batch, 1, 1, channels), each between 0 and 1."""
        return run(self.fc, self.avg_pool(x))

    def call(self, x):
        return x * self.gates(x)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.output_dim or input_shape[-1])

    def get_config(self):
        return {
            **super().get_config(),
            "output_dim": self.output_dim,
            "expansion": self.expansion,
        }


@keras.saving.register_keras_serializable(package="gcvit")
class ReduceSize(layers.Layer):
    """Halve height and width and double the channels, with convolutions.

    Normalize, refine with a fused MBConv and its residual, convolve 3x3 with stride 2,
    normalize. The paper calls it the downsampler.

    Shapes: (batch, height, width, channels) in, (batch, ⌈height/2⌉, ⌈width/2⌉,
    2·channels) out.

    Args:
        keepdims: keep the number of channels instead of doubling it; default `False`.
            Height and width are halved either way.

    Raises:
        ValueError: for an input that is not a feature map.

    Source: paper, section 3; official `gc_vit.py`, `ReduceSize`.
    """

    def __init__(self, keepdims=False, **kwargs):
        super().__init__(**kwargs)
        self.keepdims = keepdims

    def build(self, input_shape):
        channels = feature_map_shape(self, input_shape)[-1]
        dtype = self.dtype_policy
        # 1e-5 is PyTorch's epsilon; Keras's default is 1e-3.
        self.norm1 = fast.LayerNormalization(epsilon=1e-5, dtype=dtype, name="norm1")
        self.conv = fused_mbconv(channels, dtype)
        self.reduction = convolution(
            self._output_channels(channels),
            3,
            strides=2,
            pad=1,
            use_bias=False,
            dtype=dtype,
            name="reduction",
        )
        self.norm2 = fast.LayerNormalization(epsilon=1e-5, dtype=dtype, name="norm2")
        for layer in (self.norm1, *self.conv, self.reduction):
            layer.build(input_shape)
        self.norm2.build(self.compute_output_shape(input_shape))

    def call(self, x):
        x = self.norm1(x)
        x = x + run(self.conv, x)
        return self.norm2(self.reduction(x))

    def compute_output_shape(self, input_shape):
        return halved(input_shape, self._output_channels(input_shape[-1]))

    def _output_channels(self, channels):
        return channels if self.keepdims else 2 * channels

    def get_config(self):
        return {**super().get_config(), "keepdims": self.keepdims}


@keras.saving.register_keras_serializable(package="gcvit")
class MLP(layers.Layer):
    """Two dense layers with an activation between them, applied to each token alone.

    Shapes: (..., channels) in, (..., `out_features`) out.

    Args:
        hidden_features: units of the first layer; default `None`: the input's channels.
        out_features: units of the second layer; default `None`: the input's channels.
        activation: activation between the two; default "gelu", the exact one.
        dropout: dropout rate after each layer; default 0.

    Source: paper, section 3.2 and equation 2; official `gc_vit.py`, `Mlp`.
    """

    def __init__(
        self, hidden_features=None, out_features=None, activation="gelu", dropout=0.0, **kwargs
    ):
        super().__init__(**kwargs)
        for name, value in (("hidden_features", hidden_features), ("out_features", out_features)):
            if value is not None:
                positive_whole(name, value)
        self.hidden_features = hidden_features
        self.out_features = out_features
        self.activation = activation
        self.dropout = dropout

    def build(self, input_shape):
        channels = input_shape[-1]
        hidden = self.hidden_features or channels
        dtype = self.dtype_policy
        self.fc1 = dense(hidden, dtype=dtype, name="fc1")
        self.act = fast.Activation(self.activation, dtype=dtype, name="act")
        self.drop1 = layers.Dropout(self.dropout, dtype=dtype, name="drop1")
        self.fc2 = dense(self.out_features or channels, dtype=dtype, name="fc2")
        self.drop2 = layers.Dropout(self.dropout, dtype=dtype, name="drop2")
        self.fc1.build(input_shape)
        for layer in (self.act, self.drop1, self.fc2):
            layer.build((*input_shape[:-1], hidden))
        self.drop2.build(self.compute_output_shape(input_shape))

    def call(self, x):
        # One matrix, a row for each token: TensorFlow computes product, bias and GELU at once.
        rows = ops.reshape(x, (-1, x.shape[-1]))
        rows = self.drop1(self.act(self.fc1(rows)))
        rows = self.drop2(self.fc2(rows))
        return ops.reshape(rows, (*ops.shape(x)[:-1], rows.shape[-1]))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.out_features or input_shape[-1])

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_features": self.hidden_features,
            "out_features": self.out_features,
            "activation": keras.activations.serialize(keras.activations.get(self.activation)),
            "dropout": self.dropout,
        }
