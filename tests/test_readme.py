"""The README's table of fidelity says what the results say."""

import json

import pytest
import readme

RESULTS = json.loads((readme.ROOT / "gcvit" / "results" / "timm.json").read_text(encoding="utf-8"))
SMALL = {
    "timm": {"hardware": "a machine", "versions": {"timm": "1.0", "torch": "2.1"}},
    "variants": {
        "gcvit_one": {"image_size": 224, "mean_logit": 0.9},
        "gcvit_two": {"image_size": 96, "mean_logit": 0.5},
    },
    "backends": {
        "jax": {
            "hardware": "a machine",
            "versions": {"keras": "3.1", "jax": "0.4"},
            "largest_difference": {"gcvit_one": 1.2e-6},
        },
        "torch": {
            "hardware": "another",
            "versions": {"torch": "2.1"},
            "largest_difference": {"gcvit_one": 2e-6, "gcvit_two": 3e-6},
        },
    },
}


def test_the_readme_has_the_table_of_the_results():
    text = readme.README.read_text(encoding="utf-8")
    assert text == readme.with_table(text, readme.fidelity(RESULTS, *readme.shipped_notes()))


def test_every_difference_is_rounding():
    """2e-5 is what the tests of numbers allow; chapter 13 says why."""
    assert set(RESULTS["backends"]) == set(readme.BACKENDS)
    for backend in RESULTS["backends"].values():
        assert backend["largest_difference"].keys() <= RESULTS["variants"].keys()
        assert 0 < max(backend["largest_difference"].values()) < 2e-5
    assert min(row["mean_logit"] for row in RESULTS["variants"].values()) > 0.5


def test_each_number_stands_in_its_row_and_column_and_what_is_lacking_is_said():
    head, _, one, two = readme.table(SMALL)
    assert head.endswith("| TensorFlow | JAX | PyTorch |")
    assert one == "| `gcvit_one` | 224 px | 0.90 | not run | 1.2e-06 | 2.0e-06 |"
    assert two == "| `gcvit_two` | 96 px | 0.50 | not run | not run | 3.0e-06 |"
    text = readme.fidelity(SMALL, "nano", {"top1": "0.4567", "top5": "0.7"})
    assert "Run on a machine: Keras 3.1, JAX 0.4.\n" in text
    assert "Run on another: PyTorch 2.1.\n" in text
    assert text.endswith("`nano`, on its validation images: top-1 45.7%, top-5 70.0%.\n")


def test_only_what_stands_between_the_comments_is_replaced():
    text = f"before\n{readme.BEGIN}old\n{readme.END}after\n"
    assert readme.with_table(text, "new\n") == text.replace("old", "new")
    with pytest.raises(ValueError, match="lacks the line"):
        readme.with_table(text.replace(readme.END, ""), "new\n")
