"""How much of a chapter is run."""

import re

import pytest
from bs4 import BeautifulSoup

from gcvit import book


@pytest.mark.parametrize("device", [None, "gpu", "tpu"])
@pytest.mark.parametrize("setting", [None, "auto", "quick", "full", "brief"])
def test_the_config_follows_the_setting(monkeypatch, setting, device):
    monkeypatch.setattr(book, "accelerator", lambda: device)
    monkeypatch.delenv("GCVIT_RUN", raising=False)
    if setting:
        monkeypatch.setenv("GCVIT_RUN", setting)
    config = book.train_config()
    on_a_device = setting in (None, "auto") and device is not None
    assert config.original == (setting == "full" or on_a_device)
    assert (config.epochs < 5) == (setting == "brief")


def test_an_unknown_setting_is_refused(monkeypatch):
    monkeypatch.setenv("GCVIT_RUN", "fast")
    with pytest.raises(ValueError, match="auto, quick, full or brief; got 'fast'"):
        book.train_config()


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
