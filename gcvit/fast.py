"""Appendix C: Keras's layers with a faster way to the same numbers, backend by backend.

Each class is Keras's of the same name, with its weights and its checkpoint paths; only `call`
differs, and only where that was measured to pay. Elsewhere it is Keras's own.

Milliseconds below were measured in float32 on one thread of a CPU, on 8 maps of 56 x 56 x 64,
unless they are said to be of something else. Convolutions and pooling together took xxtiny's
forward pass on JAX from 1.2 to 0.8 s for 8 images of 224 px, and its training step from 8.4 to
4.5 s. For 16 images on two cores, all that is done for PyTorch took the forward pass from 0.82 to
0.48 s, in a process that keeps freed memory. On TensorFlow, what its graph optimizer finds and XLA
compiles took it from 0.52 to 0.40 s, and the training step from 1.69 to 1.45 s.

On JAX on the CPU these gradients can be taken backwards only, as training does: `jax.grad` and
`jax.vjp` work, `jax.jvp` and `jax.jacfwd` do not.
"""

import contextvars
import functools
import math

import keras
from keras import layers, ops


def device_kinds():
    """Return the kinds of devices that Keras's backend computes on, such as {"cpu", "gpu"}."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return {device.device_type.lower() for device in tf.config.list_physical_devices()}
    if backend == "jax":
        import jax

        return {jax.default_backend()}
    import torch

    return {"gpu" if torch.cuda.is_available() else "cpu"}


@functools.cache
def without_accelerator(backend):
    """Tell whether Keras runs on `backend`, such as "jax", and that on the CPU."""
    return keras.backend.backend() == backend and device_kinds() == {"cpu"}


def tensor_of(weight):
    """Return a layer's weight as a tensor, or the `None` that stands for no bias."""
    return None if weight is None else ops.convert_to_tensor(weight)


def conv_taps(x, size, strides=(1, 1)):
    """Yield the nine maps that a 3x3 window of stride 1 or 2 meets, row by row.

    Args:
        x: (..., height, width, channels), padded already.
        size: (height, width) of what the window makes of it.
        strides: steps of the window, (down, right); default 1.
    """
    (height, width), (down, right) = size, strides
    for i in range(3):
        for j in range(3):
            rows = slice(i, i + down * (height - 1) + 1, down)
            yield x[..., rows, slice(j, j + right * (width - 1) + 1, right), :]


def in_nchw(function, x, *args, **kwargs):
    """Apply a function of PyTorch that takes maps of channels first to one of channels last.

    PyTorch takes the map as it lies in memory; Keras copies it into the other order first,
    and its copies were a third of xxtiny's forward pass on a CPU.

    Args:
        function: takes (batch, channels, height, width), and what else is given.
        x: (batch, height, width, channels).
        *args: what `function` takes besides.
        **kwargs: what it takes by name.
    """
    return function(x.permute(0, 3, 1, 2), *args, **kwargs).permute(0, 2, 3, 1)


def joined(sublayers):
    """Return layers to pass a map through, on PyTorch on the CPU without a padding at the front.

    The convolution behind a `ZeroPadding2D` of one pixel adds the zeros itself there, which saves
    copies of the maps with zeros around them. Without this, xxtiny's forward pass takes 555 ms for
    16 images on two cores; with it, 505.
    """
    padded = sublayers and isinstance(sublayers[0], layers.ZeroPadding2D)
    if not padded or not without_accelerator("torch"):
        return sublayers
    _, convolution, *rest = sublayers
    return [functools.partial(convolution, pad=1), *rest]


def custom_kernel_vjp(function, of_a_part, by_input=None, cut=lambda maps: maps):
    """Give a function of maps and a kernel a gradient by the kernel in parts, on JAX.

    XLA on the CPU computes that of a convolution as one whose window is the whole map: 112 ms
    for a depthwise kernel, 12 this way; 46 and 16 for 3x3 with stride 2. For that of a matrix
    product it writes the maps a second time, transposed, and for this computes what the
    blocks above have sent back anew in each block.

    Args:
        function: (maps, kernel) to new maps.
        of_a_part: (a part of the maps, the upstream gradient of what it became) to its share
            of the gradient by the kernel.
        by_input: (maps, kernel, upstream gradient) to the gradient by the maps; default:
            JAX's own.
        cut: what cuts maps into parts, along a new first axis or the old one; default: each
            image is a part.
    """
    import jax

    @jax.custom_vjp
    def call(x, kernel):
        return function(x, kernel)

    def forward(x, kernel):
        return function(x, kernel), (x, kernel)

    def backward(kept, upstream):
        x, kernel = kept
        if by_input is None:
            _, transposed = jax.vjp(lambda x: function(x, kernel), x)
            (by_x,) = transposed(upstream)
        else:
            by_x = by_input(x, kernel, upstream)

        def add(total, part):
            share = of_a_part(*part).reshape(kernel.shape)
            return total + share.astype("float32"), None

        # One part after the other: copies of all of them would fill memory at once.
        parts = cut(x), cut(upstream)
        by_kernel, _ = jax.lax.scan(add, jax.numpy.zeros(kernel.shape), parts)
        return by_x, by_kernel.astype(kernel.dtype)

    call.defvjp(forward, backward)
    return call


PIXELS_FOR_PARTS = {"tensorflow": 192**2, "jax": 96**2, "torch": 96**2}
"""From how many pixels an image has on, `map_images` saves more in the stem than it costs."""


def map_images(function, x):
    """Return `function` of maps, on the CPU computed for a few images at a time if they are large.

    A few images' maps stay in the processor's cache, and take the memory that those before them
    left; in xxtiny's stem, each map of 16 images takes 51 MB, and memory that is asked for anew.
    Forward passes of 16 images on two cores, without and with this: PyTorch, four images at a
    time, 690 and 620 ms; TensorFlow, two, 628 and 585; JAX, one, 575 and 525.

    PyTorch does so where no gradients are wanted. On TensorFlow a training step takes 1 to 4 %
    less. On JAX gradients compute an image's maps once more: a step takes as long as before, and
    0.6 GB less. In eager mode, these two would trace or compile the loop anew in each call.

    Args:
        function: takes (batch, height, width, channels); treats each image by itself.
        x: (batch, height, width, channels); all at once where height or width is not known.
    """
    backend = keras.backend.backend()
    images, *sides = x.shape[:3]
    large = None not in sides and math.prod(sides) >= PIXELS_FOR_PARTS.get(backend, math.inf)
    if images == 1 or not large or not without_accelerator(backend) or _under_xla.get():
        return function(x)

    def of_an_image(image):
        return function(image[None])[0]

    if backend == "tensorflow":
        import tensorflow as tf

        if not tf.executing_eagerly():
            return tf.map_fn(of_an_image, x, parallel_iterations=2)
    elif backend == "jax":
        import jax

        if isinstance(x, jax.core.Tracer):
            return jax.lax.map(jax.checkpoint(of_an_image), x)
    else:
        import torch

        # A traced graph must not depend on the number of images.
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return torch.cat([function(part) for part in x.split(4)])
    return function(x)


FEW = 2
"""Up to how many images `as_one` compiles. Evaluating many would wait for XLA, and gain less."""

PIXELS_AS_ONE = 256**2
"""Up to how many pixels of an image XLA computes a forward pass faster than TensorFlow."""

_under_xla = contextvars.ContextVar("under_xla", default=False)


def as_one(function, images):
    """Return `function(images)`, in TensorFlow's graphs on the CPU as XLA compiles it for a few.

    TensorFlow hands each small operation to its other threads, which costs more than it saves;
    XLA makes fewer and larger ones. On two cores, xxtiny's forward pass takes 46 ms, not 59, for
    an image of 224 px, 72, not 81, for two, 11, not 25, for one of 64 px; but 217, not 198, for
    one of 448 px, and 520, not 440, for 16 of 224 px. XLA takes 3 s for each shape. So larger
    batches are left to TensorFlow, and those whose size is not known before.

    Args:
        function: takes the images, and trains nothing.
        images: (batch, height, width, channels).
    """
    if not without_accelerator("tensorflow") or isinstance(images, keras.KerasTensor):
        return function(images)  # looking at a batch's size would fix it in PyTorch's export
    import tensorflow as tf

    shape = images.shape[:3]
    few = None not in shape and shape[0] <= FEW and math.prod(shape[1:]) <= PIXELS_AS_ONE
    if not few or images.dtype != "float32" or tf.executing_eagerly():
        return function(images)
    outside = _under_xla.set(True)
    try:
        return tf.function(function, autograph=False, jit_compile=True)(images)
    finally:
        _under_xla.reset(outside)


def compiled(function, *tensors):
    """Return `function` of the tensors, on TensorFlow as XLA compiles it: into few loops or one.

    XLA takes a tenth of a second for each shape. So where nothing else is compiled, in eager
    mode, this is not either.
    """
    import tensorflow as tf

    if tf.executing_eagerly():
        return function(*tensors)
    return _compiled(function, *(tf.TensorSpec(x.shape, x.dtype) for x in tensors))(*tensors)


@functools.cache
def _compiled(function, *specs):
    import tensorflow as tf

    return tf.function(function, input_signature=specs, autograph=False, jit_compile=True)


def product(x, kernel):
    """Return `x @ kernel`, on JAX on the CPU, `custom_kernel_vjp`.

    Together with the bias of `Dense` by `bias_add` it took xxtiny's training step from
    3.9 to 2.9 s for 16 images, on two cores.
    """

    def cut(maps):
        rows = math.prod(maps.shape[:-1])
        return maps.reshape(math.gcd(rows, 64), -1, maps.shape[-1])

    return custom_kernel_vjp(ops.matmul, lambda x, upstream: x.T @ upstream, cut=cut)(x, kernel)


@keras.saving.register_keras_serializable(package="gcvit")
class DepthwiseConv2D(layers.DepthwiseConv2D):
    """Keras's layer, for a window of 3x3, stride 1, without padding and bias.

    Where XLA compiles it for the CPU, on JAX and in `as_one`, the sum of nine shifted maps, each
    times its weights: 2 ms, not 62. On PyTorch on the CPU, the map `in_nchw`, with `pad` zeros
    that it adds on each side: see `joined`.
    """

    def call(self, x, pad=0):
        if without_accelerator("torch"):
            from torch.nn.functional import conv2d

            kernel = tensor_of(self.kernel).permute(2, 3, 0, 1)
            return in_nchw(conv2d, x, kernel, padding=pad, groups=len(kernel))
        if not without_accelerator("jax") and not _under_xla.get():
            return super().call(x)
        size = (x.shape[-3] - 2, x.shape[-2] - 2)

        def convolve(x, kernel):
            weights = ops.unstack(ops.reshape(kernel, (9, -1)))
            return sum(part * w for part, w in zip(conv_taps(x, size), weights, strict=True))

        def of_an_image(x, upstream):
            return ops.stack([ops.sum(part * upstream, (0, 1)) for part in conv_taps(x, size)])

        kernel = tensor_of(self.kernel)
        if _under_xla.get():
            return convolve(x, kernel)
        return custom_kernel_vjp(convolve, of_an_image)(x, kernel)


@keras.saving.register_keras_serializable(package="gcvit")
class Conv2D(layers.Conv2D):
    """Keras's layer, for a window of 1x1, or of 3x3 without padding.

    On JAX on the CPU, a window of 1x1 is a matrix `product`, which takes 3 ms, not 4, and the
    gradients of one of 3x3 are products and sums of shifted maps. XLA's own gradient by the
    maps took 294 ms in the stem, for 16 images, where this takes about 90. On PyTorch on the
    CPU, the map `in_nchw`, with `pad` zeros that it adds on each side: see `joined`.
    """

    def call(self, x, pad=0):
        if without_accelerator("torch"):
            from torch.nn.functional import conv2d

            kernel, bias = tensor_of(self.kernel).permute(3, 2, 0, 1), tensor_of(self.bias)
            return in_nchw(conv2d, x, kernel, bias, stride=self.strides, padding=pad)
        if not without_accelerator("jax"):
            return super().call(x)
        kernel = tensor_of(self.kernel)
        if self.kernel_size == (1, 1):
            y = product(x, kernel[0, 0])
        else:
            y = custom_kernel_vjp(self._convolve, self._of_an_image, self._by_input)(x, kernel)
        return bias_add(y, self.bias)

    def _convolve(self, x, kernel):
        return ops.conv(x, kernel, self.strides, "valid")

    def _of_an_image(self, x, upstream):
        columns = ops.concatenate(list(conv_taps(x, upstream.shape[:2], self.strides)), -1)
        return ops.tensordot(columns, upstream, ((0, 1), (0, 1)))

    def _by_input(self, x, kernel, upstream):
        """Add up what each of the nine weights sends back, at the places that it met."""
        from jax.lax import pad

        nine = ops.split(ops.matmul(upstream, kernel.reshape(-1, kernel.shape[-1]).T), 9, axis=-1)
        total = 0
        for at, part in enumerate(nine):
            gaps = [(0, 0, 0)]
            for side, new, begin, step in zip(
                x.shape[1:3], upstream.shape[1:3], divmod(at, 3), self.strides, strict=True
            ):
                gaps.append((begin, side - begin - step * (new - 1) - 1, step - 1))
            total += pad(part, part.dtype.type(0), [*gaps, (0, 0, 0)])
        return total


@keras.saving.register_keras_serializable(package="gcvit")
class MaxPooling2D(layers.MaxPooling2D):
    """Keras's layer, for a window of 3x3, stride 2, without padding.

    On JAX on the CPU, the largest of three shifted maps down, then to the right. Its
    gradient takes 5 ms for the 50 of XLA's own pooling. On PyTorch on the CPU, the map
    `in_nchw`.
    """

    def call(self, x):
        if without_accelerator("torch"):
            from torch.nn.functional import max_pool2d

            return in_nchw(max_pool2d, x, 3, stride=2)
        if not without_accelerator("jax"):
            return super().call(x)
        height, width = ((side - 1) // 2 for side in x.shape[1:3])
        a, b, c = (x[:, i : i + 2 * height - 1 : 2] for i in range(3))
        x = ops.maximum(ops.maximum(a, b), c)
        a, b, c = (x[:, :, i : i + 2 * width - 1 : 2] for i in range(3))
        return ops.maximum(ops.maximum(a, b), c)


@keras.saving.register_keras_serializable(package="gcvit")
class Dense(layers.Dense):
    """Keras's layer, on JAX on the CPU as a `product` and `bias_add`.

    On PyTorch on the CPU, a product to which the bias is added in place; PyTorch's own operation
    for both copies the bias to each row first. Without this, xxtiny's forward pass takes 530 ms for
    16 images on two cores; with it, 505. On TensorFlow there, a product of two matrices and then
    its bias: the graph's optimizer makes one operation of both, and of a GELU behind them. Without
    this, 540 ms; with it, 490.
    """

    def call(self, x, training=None):
        if without_accelerator("torch"):
            y = x @ tensor_of(self.kernel)
            if self.bias is not None:
                y += tensor_of(self.bias)
        elif without_accelerator("jax"):
            y = bias_add(product(x, tensor_of(self.kernel)), self.bias)
        elif without_accelerator("tensorflow"):
            import tensorflow as tf

            y = tf.matmul(tf.reshape(x, (-1, x.shape[-1])), tensor_of(self.kernel))
            if self.bias is not None:
                y = tf.nn.bias_add(y, tensor_of(self.bias))
            if len(x.shape) != 2:  # a reshape here would part the bias from a GELU behind it
                y = ops.reshape(y, (*ops.shape(x)[:-1], self.units))
        else:
            return super().call(x, training=training)
        return y if self.activation is None else self.activation(y)


@keras.saving.register_keras_serializable(package="gcvit")
class LayerNormalization(layers.LayerNormalization):
    """Keras's layer over the last axis, with both passes of its own on TensorFlow on the CPU.

    Forwards, oneDNN's one operation in place of several: 1.4 ms, not 4.4, for 16 maps of 56 x 56 x
    64 on two cores. Backwards, as XLA compiles it: 4.5 ms, not 9.4. It keeps only the layer's
    input, where TensorFlow would keep a map for each step of the formula.
    """

    def call(self, x):
        if not without_accelerator("tensorflow") or self.compute_dtype != "float32":
            return super().call(x)
        import tensorflow as tf

        @tf.custom_gradient
        def normalized(x, gamma, beta):
            def gradient(upstream):
                epsilon = tf.constant(self.epsilon)
                by_x, by_gamma = compiled(normalization_gradients, x, gamma, epsilon, upstream)
                rows = tf.ones((1, tf.shape(x)[0]))
                return by_x, (rows @ by_gamma)[0], (rows @ upstream)[0]

            return self._of_rows(x) * gamma + beta, gradient

        rows = tf.reshape(x, (-1, x.shape[-1]))
        gamma, beta = (tf.convert_to_tensor(weight) for weight in (self.gamma, self.beta))
        return tf.reshape(normalized(rows, gamma, beta), tf.shape(x))

    def _of_rows(self, x):
        """Standardize each of (rows, channels), spelled as TensorFlow's graph optimizer wants it.

        It takes a batch normalization of one image that has the rows for its channels, times
        gamma, plus beta, for a layer normalization. It finds that only if it does not know the
        number of rows beforehand: hence the placeholders.
        """
        import tensorflow as tf

        unknown, none = tf.compat.v1.placeholder_with_default, tf.zeros(0)
        x = unknown(x, (None, x.shape[-1]))
        rows = unknown(tf.shape(x)[:1], (1,))
        standard, *_ = tf.raw_ops.FusedBatchNormV3(
            x=tf.reshape(x, (1, -1, x.shape[-1], 1)),
            scale=tf.fill(rows, 1.0),
            offset=tf.fill(rows, 0.0),
            mean=none,
            variance=none,
            epsilon=self.epsilon,
            data_format="NCHW",
        )
        return tf.reshape(standard, tf.shape(x))


def normalization_gradients(x, gamma, epsilon, upstream):
    """Return a layer norm's gradient by its input, and what each row adds to that by gamma.

    Args:
        x: (rows, channels).
        gamma: (channels,).
        epsilon: a tensor of one number.
        upstream: (rows, channels).
    """
    # Products with a column of equal numbers: XLA's own sums take twice as long.
    mean = ops.full((x.shape[-1], 1), 1 / x.shape[-1])
    centerd = x - x @ mean
    scale = ops.rsqrt(ops.square(centerd) @ mean + epsilon)
    standard, weighted = centerd * scale, upstream * gamma
    by_x = weighted - weighted @ mean - standard * ((weighted * standard) @ mean)
    return by_x * scale, upstream * standard


@keras.saving.register_keras_serializable(package="gcvit")
class Activation(layers.Activation):
    """Keras's layer, with a faster exact GELU in float32 on TensorFlow and JAX on the CPU.

    Keras writes GELU with erfc, which keeps digits of values near zero that float32 has
    no use for here. With erf, 192 channels take 9 ms, not 18, on TensorFlow, 3, not 8, on JAX.
    A training step on TensorFlow has XLA compile it and its gradient. That took xxtiny's step
    from 1.66 to 1.50 s for 16 images, on two cores.
    """

    def call(self, x, training=None):
        exact = self.activation is keras.activations.gelu and x.dtype == "float32"
        if exact and without_accelerator("jax"):
            return gelu(x)
        if not exact or not without_accelerator("tensorflow"):
            return super().call(x)
        if not training:
            return gelu(x)
        import tensorflow as tf

        @tf.custom_gradient
        def trained(x):
            return compiled(gelu, x), functools.partial(compiled, gelu_gradient, x)

        return trained(x)


def normal_cdf(x):
    """Return Φ(x), the share of a normal distribution that lies below `x`, spelled with erf."""
    return 0.5 * (1 + ops.erf(x * 0.5**0.5))


def gelu(x):
    """Return the exact GELU of `x`, x·Φ(x)."""
    return x * normal_cdf(x)


def gelu_gradient(x, upstream):
    """Return the gradient of `gelu` by `x`: Φ(x) + x·φ(x), times what comes from above."""
    density = ops.exp(-0.5 * ops.square(x) - 0.5 * math.log(2 * math.pi))
    return upstream * (normal_cdf(x) + x * density)


def bias_add(maps, bias):
    """Return `maps + bias`: to each of (..., a, b, c) one and the same (a, b, c), or `None`.

    On JAX on the CPU, the gradient by the bias, a sum over all maps, is a product with a
    row of ones: for 8 images' (8, 196, 196) it takes 0.4 ms, XLA's own sum 26 to 30.
    """
    if bias is None:
        return maps
    if not without_accelerator("jax") or isinstance(maps, keras.KerasTensor):
        return maps + bias
    import jax

    bias = tensor_of(bias)

    @jax.custom_vjp
    def add(maps, bias):
        return maps + bias

    def backward(_, upstream):
        rows = upstream.reshape(-1, bias.size)
        total = jax.numpy.ones((1, len(rows)), rows.dtype) @ rows
        return upstream, total.reshape(bias.shape)

    add.defvjp(lambda maps, bias: (maps + bias, None), backward)
    return add(maps, bias)


def can_use_sdpa():
    """Tell whether `attend` serves here: on PyTorch on the CPU, where no gradients are wanted.

    Its one operation has none by the bias; with them, PyTorch takes several after all, and in a
    slower way.
    """
    if not without_accelerator("torch"):
        return False
    import torch

    return not torch.is_grad_enabled()


def attend(q, k, v, bias, scale):
    """Return softmax(scale · q·kᵀ + bias)·v in one operation of PyTorch.

    It computes some rows of the scores at a time, and copies neither k nor v. Without this,
    xxtiny's forward pass takes 560 ms for 16 images on two cores; with it, 505.

    Args:
        q: (batch, windows or 1, heads, tokens, head channels); one window's serve all.
        k: (batch, windows, heads, tokens, head channels).
        v: like `k`.
        bias: (heads, tokens, tokens).
        scale: factor on the query.

    Returns:
        What the queries take up of `v`, of its shape.
    """
    from torch.nn.functional import scaled_dot_product_attention

    every_window = (part.flatten(0, 1) for part in (q.expand_as(k), k, v))
    mixed = scaled_dot_product_attention(*every_window, attn_mask=bias[None], scale=scale)
    return mixed.unflatten(0, k.shape[:2])
