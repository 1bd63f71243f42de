"""Every layer and the model keep what Keras asks of a layer; Keras's own test of that says so.

It makes the layer, takes its configuration and the serialized layer round trip, builds it, calls
it on symbols and on numbers, trains it for a step, and computes in half precision.
"""

import pytest

import gcvit

pytestmark = pytest.mark.numerics

MAP = (2, 8, 8, 8)
SMALL_MODEL = {"window_size": (2,), "embed_dim": 8, "depths": (2,), "num_heads": (2,)}
WITH_QUERY = {"x_shape": MAP, "q_global_shape": (2, 4, 4, 8)}

# Class, arguments, shape of the input, shape of the output.
CASES = {
    "SqueezeAndExcitation": (gcvit.SqueezeAndExcitation, {}, MAP, MAP),
    "ReduceSize": (gcvit.ReduceSize, {}, (2, 7, 8, 8), (2, 4, 4, 16)),
    "MLP": (gcvit.MLP, {"hidden_features": 16, "out_features": 4}, MAP, (2, 8, 8, 4)),
    "PatchEmbed": (gcvit.PatchEmbed, {"embed_dim": 8}, (2, 30, 32, 3), (2, 8, 8, 8)),
}
