"""Chapter 14: Keras's layers with a faster way to the same numbers, backend by backend.

Each class is Keras's of the same name, with its weights and its checkpoint paths; only `call`
differs, and only where that was measured to pay. Elsewhere it is Keras's own.

Measured in float32 on one thread of a CPU, on 8 maps of 56 x 56 x 64: milliseconds given
below are from there. Convolutions and pooling together took xxtiny's forward pass on JAX
from 1.2 to 0.8 s for 8 images of 224 px, and its training step from 8.4 to 4.5 s.
"""

import functools

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
    """Tell whether Keras runs on `backend`, "tensorflow" or "jax", and that on the CPU."""
    return keras.backend.backend() == backend and device_kinds() == {"cpu"}


def shifted(x, size, strides=(1, 1)):
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


def with_kernel_gradient(convolve, of_an_image):
    """Give a convolution a gradient by its kernel that is computed image by image, on JAX.

    XLA on the CPU computes that gradient as a convolution whose window is the whole map:
    112 ms for a depthwise kernel, 12 this way; 46 and 16 for 3x3 with stride 2.

    Args:
        convolve: (images, kernel) to the maps.
        of_an_image: (image, upstream gradient of its map) to the gradient by the kernel.
    """
    import jax

    @jax.custom_vjp
    def convolution(x, kernel):
        return convolve(x, kernel)

    def forward(x, kernel):
        return convolve(x, kernel), (x, kernel)

    def backward(kept, upstream):
        x, kernel = kept
        _, by_x = jax.vjp(lambda x: convolve(x, kernel), x)

        def add(total, image):
            part = of_an_image(*image).reshape(kernel.shape)
            return total + part.astype("float32"), None

        # One image after the other: their shifted copies would fill memory all at once.
        by_kernel, _ = jax.lax.scan(add, jax.numpy.zeros(kernel.shape), (x, upstream))
        return *by_x(upstream), by_kernel.astype(kernel.dtype)

    convolution.defvjp(forward, backward)
    return convolution


class DepthwiseConv2D(layers.DepthwiseConv2D):
    """Keras's layer, for a window of 3x3, stride 1, without padding and bias.

    On JAX on the CPU, the sum of nine shifted maps, each times its weights: 2 ms for 62.
    """

    def call(self, x):
        if not without_accelerator("jax"):
            return super().call(x)
        size = (x.shape[-3] - 2, x.shape[-2] - 2)

        def convolve(x, kernel):
            weights = kernel.reshape(9, -1)
            return sum(part * w for part, w in zip(shifted(x, size), weights, strict=True))

        def of_an_image(x, upstream):
            return ops.stack([ops.sum(part * upstream, (0, 1)) for part in shifted(x, size)])

        kernel = ops.convert_to_tensor(self.kernel)
        return with_kernel_gradient(convolve, of_an_image)(x, kernel)


class Conv2D(layers.Conv2D):
    """Keras's layer, for a window of 1x1, or of 3x3 without padding.

    On JAX on the CPU, a window of 1x1 is a matrix product, and the gradient by a kernel of
    3x3 is one of the shifted maps, side by side, and the upstream gradient. The matrix
    product takes 3 ms for 4, and its gradients 11 for 29.
    """

    def call(self, x):
        if not without_accelerator("jax"):
            return super().call(x)
        kernel = ops.convert_to_tensor(self.kernel)
        if self.kernel_size == (1, 1):
            y = ops.matmul(x, kernel[0, 0])
        else:
            y = with_kernel_gradient(self._convolve, self._of_an_image)(x, kernel)
        return y + ops.convert_to_tensor(self.bias) if self.use_bias else y

    def _convolve(self, x, kernel):
        return ops.conv(x, kernel, self.strides, "valid")

    def _of_an_image(self, x, upstream):
        columns = ops.concatenate(list(shifted(x, upstream.shape[:2], self.strides)), -1)
        return ops.tensordot(columns, upstream, ((0, 1), (0, 1)))


class MaxPooling2D(layers.MaxPooling2D):
    """Keras's layer, for a window of 3x3, stride 2, without padding.

    On JAX on the CPU, the largest of three shifted maps down, then to the right. Its
    gradient takes 5 ms for the 50 of XLA's own pooling.
    """

    def call(self, x):
        if not without_accelerator("jax"):
            return super().call(x)
        height, width = ((side - 1) // 2 for side in x.shape[1:3])
        a, b, c = (x[:, i : i + 2 * height - 1 : 2] for i in range(3))
        x = ops.maximum(ops.maximum(a, b), c)
        a, b, c = (x[:, :, i : i + 2 * width - 1 : 2] for i in range(3))
        return ops.maximum(ops.maximum(a, b), c)


class Activation(layers.Activation):
    """Keras's layer, with a faster exact GELU in float32 on TensorFlow and JAX on the CPU.

    Keras writes GELU with erfc, which keeps digits of values near zero that float32 has
    no use for here. With erf, 192 channels take 9 ms for 18 on TensorFlow, 3 for 8 on JAX.
    """

    def call(self, x):
        exact = self.activation is keras.activations.gelu and x.dtype == "float32"
        if exact and (without_accelerator("tensorflow") or without_accelerator("jax")):
            return 0.5 * x * (1 + ops.erf(x * 0.5**0.5))
        return super().call(x)


def add_to_each(maps, bias):
    """Return `maps + bias`: to each of (..., a, b, c) one and the same (a, b, c).

    On JAX on the CPU, the gradient by the bias, a sum over all maps, is a product with a
    row of ones: for 8 images' (8, 196, 196) it takes 0.4 ms, XLA's own sum 26 to 30.
    """
    if not without_accelerator("jax") or isinstance(maps, keras.KerasTensor):
        return maps + bias
    import jax

    bias = ops.convert_to_tensor(bias)

    @jax.custom_vjp
    def add(maps, bias):
        return maps + bias

    def backward(_, upstream):
        rows = upstream.reshape(-1, bias.size)
        total = jax.numpy.ones((1, len(rows)), rows.dtype) @ rows
        return upstream, total.reshape(bias.shape)

    add.defvjp(lambda maps, bias: (maps + bias, None), backward)
    return add(maps, bias)
