"""How much of a chapter is run."""

import pytest
import tensorflow as tf

from gcvit import book, fine_tuning
from gcvit.fine_tuning import (
    Photographs,
    training,
)


@pytest.mark.parametrize("device", [None, "gpu", "tpu"])
@pytest.mark.parametrize("setting", [None, "auto", "quick", "full", "brief"])
@pytest.mark.parametrize("imagenet", [True, False])
def test_the_plan_follows_the_setting(monkeypatch, setting, device, imagenet):
    monkeypatch.setattr(book, "accelerator", lambda: device)
    monkeypatch.setattr(training, "accelerator", lambda: device)
    monkeypatch.setattr(book, "imagenet_weights", lambda: imagenet)
    monkeypatch.delenv("GCVIT_RUN", raising=False)
    if setting:
        monkeypatch.setenv("GCVIT_RUN", setting)
    nothing = tf.data.Dataset.range(0)
    photos = Photographs(nothing, nothing, list("abcde"), 3303, 367, "", "tf_flowers")
    plan = book.run_plan(photos)
    full = setting == "full" or (setting in (None, "auto") and device is not None)
    assert plan.name == ("full" if full else "brief" if setting == "brief" else "quick")
    assert plan.name != "brief" or plan.epochs == 1
    assert (plan.preset, plan.weights, plan.image_size) == (
        ("gcvit_xxtiny", "imagenet", 224) if imagenet else ("gcvit_nano", "flowers", 128)
    )
    if full:
        assert (plan.train_size, plan.epochs, plan.batch_size) == (None, 5, 32)
        assert plan.recipe == "original"
    else:
        assert 0 < plan.train_size <= 480 and plan.validation_size < 367
    said = " ".join(plan.notes)
    assert ("Left out" in said) == (not full)
    assert ("no test of transfer" in said) == (not imagenet)
    expected = {None: "float32", "gpu": "mixed_float16", "tpu": "mixed_bfloat16"}[device]
    assert plan.dtype == expected


def test_an_unknown_setting_is_refused(monkeypatch):
    monkeypatch.setenv("GCVIT_RUN", "fast")
    with pytest.raises(ValueError, match="auto, quick, full or brief; got 'fast'"):
        book.run_plan(fine_tuning.embedded_photographs(per_class=4))


def test_nobody_watches_a_test():
    assert not book.is_interactive() and book.verbosity() == 2
