"""How much of a chapter is run."""

import re

import pytest
import tensorflow as tf
from bs4 import BeautifulSoup

from gcvit import book, fine_tuning
from gcvit.fine_tuning import Photographs


@pytest.mark.parametrize("device", [None, "gpu", "tpu"])
@pytest.mark.parametrize("setting", [None, "auto", "quick", "full", "brief"])
@pytest.mark.parametrize("imagenet", [True, False])
def test_the_config_follows_the_setting(monkeypatch, setting, device, imagenet):
    monkeypatch.setattr(book, "accelerator", lambda: device)
    monkeypatch.setattr(book, "imagenet_weights", lambda: imagenet)
    monkeypatch.delenv("GCVIT_RUN", raising=False)
    if setting:
        monkeypatch.setenv("GCVIT_RUN", setting)
    nothing = tf.data.Dataset.range(0)
    photos = Photographs(nothing, nothing, nothing, list("abcde"), 3303, 367, "", "tf_flowers")
    config = book.train_config(photos)
    full = setting == "full" or (setting in (None, "auto") and device is not None)
    assert config.name == ("full" if full else "brief" if setting == "brief" else "quick")
    assert config.name != "brief" or config.epochs == 1
    assert (config.preset, config.weights) == (
        ("gcvit_xxtiny", "imagenet") if imagenet else ("gcvit_nano", "tiny_imagenet")
    )
    if full:
        assert (config.train_size, config.epochs, config.batch_size) == (None, 5, 32)
        assert config.recipe == "original"
    else:
        assert 0 < config.train_size <= 480 and config.validation_size < 367
    notes = " ".join(config.notes)
    assert ("Left out" in notes) == (not full)


def test_an_unknown_setting_is_refused(monkeypatch):
    monkeypatch.setenv("GCVIT_RUN", "fast")
    with pytest.raises(ValueError, match="auto, quick, full or brief; got 'fast'"):
        book.train_config(fine_tuning.embedded_photographs(per_class=4))


def test_nobody_watches_a_test():
    assert not book.is_interactive() and book.verbosity() == 2


def test_a_question_marks_the_computed_answer_and_opens_what_is_said_of_each_choice():
    choices = {8: "Four windows in each <direction>.", 16: "All of them."}
    soup = BeautifulSoup(book.check_yourself("How many?", 4 * 4, choices).data, "html.parser")
    assert [item["class"] for item in soup.select("details")] == [["wrong"], ["right"]]
    assert [item.text for item in soup.select("summary")] == ["8", "16"]
    assert "Four windows in each <direction>." in soup.select_one(".wrong p").text


@pytest.mark.parametrize(
    "choices, said", [({1: "One.", 3: "Three."}, "2, is not among"), ({2: "Yes.", 3: " "}, "[3]")]
)
def test_a_question_without_its_answer_or_its_feedback_is_refused(choices, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        book.check_yourself("How many?", 2, choices)
