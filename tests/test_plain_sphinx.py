"""Plain Sphinx is told what Jupyter Book tells it."""

import plain_sphinx
import pytest
import yaml
from jupyter_book.config import get_final_config

CONFIG = yaml.safe_load(plain_sphinx.CONFIG.read_text(encoding="utf-8"))
CHOSEN = {"exclude_patterns", "extensions", "myst_enable_extensions", "nb_execution_cache_path"}
"""Settings of which Jupyter Book takes more, for other books, or which it completes later."""


def test_every_setting_is_the_one_of_jupyter_book():
    ours = plain_sphinx.settings(CONFIG)
    theirs, _ = get_final_config(
        user_yaml=plain_sphinx.CONFIG,
        cli_config={"latex_individualpages": False},
        sourcedir=plain_sphinx.BOOK,
    )
    for name in plain_sphinx.RELATIVE:
        theirs[name] = [str(plain_sphinx.BOOK / path) for path in theirs[name]]
    for name in CHOSEN - {"nb_execution_cache_path"}:
        assert set(ours[name]) <= set(theirs[name]), name
    for name in set(ours) & set(theirs) - CHOSEN - {"html_theme_options"}:
        assert ours[name] == theirs[name], name
    assert set(ours) - set(theirs) == {"external_toc_path", "project"}
    chosen, given = ours["html_theme_options"], theirs["html_theme_options"]
    assert chosen.pop("launch_buttons").items() <= given.pop("launch_buttons").items()
    assert chosen.items() <= given.items()
    assert {name for name in given.keys() - chosen.keys() if given[name]} == {"analytics"}
    assert "jupyter_book" not in ours["extensions"]


def test_a_part_that_is_not_translated_is_named():
    with pytest.raises(ValueError, match=r"not translated: \['latex'\]"):
        plain_sphinx.settings({**CONFIG, "latex": {}})


def test_the_configuration_can_be_run(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_sphinx, "PLAIN", tmp_path / "plain")
    made = plain_sphinx.settings(CONFIG)
    plain_sphinx.write_configuration(made, CONFIG["sphinx"]["local_extensions"])
    names = {}
    with monkeypatch.context() as patch:
        patch.setattr("sys.path", [])
        exec((tmp_path / "plain" / "conf.py").read_text(encoding="utf-8"), names)
        assert names["sys"].path == [str(plain_sphinx.ROOT / "tools" / "book")]
    assert {name: names[name] for name in made} == made
