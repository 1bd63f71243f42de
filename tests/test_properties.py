"""A short run of what `make fuzz` draws at length: ordinary use loses nothing, alters nothing."""

import keras
import properties
import pytest

EXAMPLES = {"folder": 12, "levels": 25, "checkpoint": 12, "order": 6, "command": 3}

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the numbers of the others are tested elsewhere"
)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return properties.properties(tmp_path_factory.mktemp("output"))


def test_every_property_has_its_examples(known):
    assert set(known) == set(EXAMPLES) == set(properties.EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_works_or_is_refused_in_a_sentence_and_all_is_as_it_was(known, name):
    known[name](properties.settings(EXAMPLES[name]))
    assert sum(times for (which, _), times in properties.COUNTS.items() if which == name) > 0


def test_the_long_run_counts_and_prints_its_faults(monkeypatch, capsys):
    def fails(settings, seed):
        properties.COUNTS["levels", "tried"] += 1
        raise AssertionError(f"left out: /tmp/{seed}/a.png")

    monkeypatch.setattr(properties, "properties", lambda place: {"levels": fails})
    monkeypatch.setattr("sys.argv", ["properties.py", "--minutes", "0.001"])
    assert properties.main() == 1
    shown = capsys.readouterr().out
    assert shown.count("FAULT, levels") == 1 and "left out: /tmp/0/a.png" in shown
