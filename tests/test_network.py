"""What needs the internet: run weekly, with `pytest -m network`."""

import keras
import numpy as np
import pytest
from conftest import to_numpy
from keras.applications.imagenet_utils import decode_predictions, preprocess_input
from skimage.data import chelsea

from gcvit import PRESETS, GCViT, fine_tuning

pytestmark = pytest.mark.network


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))


def top_five(weights):
    model = GCViT.from_preset("gcvit_xxtiny", weights=weights)
    image = preprocess_input(chelsea().astype("float32"), mode="torch")
    image = keras.ops.image.resize(image, (224, 224))
    (top,) = decode_predictions(to_numpy(model(image[None])), top=5)
    return [(name, float(probability)) for _, name, probability in top]


@pytest.mark.parametrize("weights", sorted(PRESETS["gcvit_xxtiny"]["weights"]))
def test_published_weights_see_the_cat(weights):
    name, probability = top_five(weights)[0]
    assert name == "Egyptian_cat" and probability > 0.5


def test_the_release_sees_cats_next():
    """The port these weights come from prints 0.72, 0.04 and 0.03.

    It has two faults that are mended here: the first should come out no lower.
    """
    (first, probability), *others = top_five("imagenet")
    assert first == "Egyptian_cat" and probability > 0.7
    assert {name for name, _ in others[:2]} == {"tabby", "tiger_cat"}
    assert all(other < 0.15 for _, other in others)


def test_flowers_are_downloaded():
    photos = fine_tuning.flowers()
    assert (photos.train_size, photos.validation_size) == (2936, 367)
    batch, labels = next(iter(fine_tuning.make_dataset(photos.train, 64, batch_size=8)))
    assert np.isfinite(batch).all() and set(np.asarray(labels)) <= set(range(5))
    assert fine_tuning.flowers_are_here()
