"""Build the book without Jupyter Book: Sphinx, myst-nb, sphinx-external-toc and the theme.

    python tools/book/plain_sphinx.py                # executes what the cache does not hold
    python tools/book/plain_sphinx.py --no-outputs   # executes nothing and shows no outputs

Jupyter Book 1 sees no further releases. This shows weekly that the book does not depend on it:
_config.yml and _toc.yml stay the sources, and _build/plain/conf.py is derived from them.
CONTRIBUTING.md says what differs in the pages, which are in _build/plain/html.
"""

import argparse
import subprocess
import sys

import yaml
from build_book import (
    BOOK,
    BUILD,
    CACHE,
    CONFIG,
    ROOT,
    TOC,
    drop_stale,
    fill_cache,
    share_checkpoints,
    show_model,
    state,
)
from check_html import project_faults

PLAIN = BUILD / "plain"
EXTENSIONS = (
    *("myst_nb", "sphinx_external_toc", "sphinx_copybutton", "sphinx_togglebutton"),
    "sphinxcontrib.bibtex",
)
RELATIVE = ("html_extra_path", "templates_path", "bibtex_bibfiles", "html_static_path")
"""Settings that hold paths: in _config.yml from book/, in conf.py from where it is."""
READ = {"title", "author", "copyright", "only_build_toc_files", "repository", "execute"}
READ |= {"launch_buttons", "html", "bibtex_bibfiles", "sphinx"}


def theme_options(config):
    """Return the options of sphinx-book-theme."""
    options = dict(config["html"])
    repository = config["repository"]
    return {
        "home_page_in_toc": options.pop("home_page_in_navbar"),
        "repository_url": repository["url"],
        "repository_branch": repository["branch"],
        "path_to_docs": repository["path_to_book"],
        "launch_buttons": config["launch_buttons"],
        "search_bar_text": "Search this book...",
        **options,
    }


def settings(config):
    """Return Sphinx's settings for what a Jupyter Book's `_config.yml` says.

    Raises:
        ValueError: for a part of it that is not translated here.
    """
    if unknown := set(config) - READ:
        raise ValueError(f"_config.yml has parts that are not translated: {sorted(unknown)}")
    execute, sphinx = config["execute"], config["sphinx"]
    static = BOOK / "_static"
    made = {
        "project": config["title"],
        "html_title": config["title"],
        "author": config["author"],
        "copyright": config["copyright"],
        "extensions": [*EXTENSIONS, *sphinx["extra_extensions"], *sphinx["local_extensions"]],
        "external_toc_path": str(TOC),
        "external_toc_exclude_missing": config["only_build_toc_files"],
        "exclude_patterns": ["**.ipynb_checkpoints"],
        "myst_enable_extensions": ["colon_fence", "dollarmath", "linkify"],
        "myst_url_schemes": ["mailto", "http", "https"],
        "nb_execution_mode": execute["execute_notebooks"],
        "nb_execution_cache_path": str(CACHE),
        "nb_execution_timeout": execute["timeout"],
        "nb_execution_allow_errors": execute["allow_errors"],
        "nb_output_stderr": execute["stderr_output"],
        "suppress_warnings": ["myst.domains"],
        "bibtex_bibfiles": config["bibtex_bibfiles"],
        "html_theme": "sphinx_book_theme",
        "html_theme_options": theme_options(config),
        "html_sourcelink_suffix": "",
        "html_static_path": [static.name],
        "html_css_files": sorted(str(p.relative_to(static)) for p in static.rglob("*.css")),
        "html_js_files": sorted(str(p.relative_to(static)) for p in static.rglob("*.js")),
        **sphinx["config"],
    }
    return made | {name: [str(BOOK / path) for path in made[name]] for name in RELATIVE}


def write_configuration(made, extensions):
    """Write conf.py, which finds the local extensions {name: folder}."""
    PLAIN.mkdir(parents=True, exist_ok=True)
    folders = sorted({str(ROOT / folder) for folder in extensions.values()})
    lines = ["import sys", "", f"sys.path[:0] = {folders!r}"]
    lines += [f"{name} = {value!r}" for name, value in made.items()]
    (PLAIN / "conf.py").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-outputs", action="store_true", help="execute nothing")
    given = parser.parse_args()
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    made = settings(config)
    if given.no_outputs:
        made["nb_execution_mode"] = "off"
    else:
        drop_stale(state())
        if failures := fill_cache(config["execute"]["timeout"]):
            sys.exit("\n\n".join(failures))
    write_configuration(made, config["sphinx"]["local_extensions"])
    html = PLAIN / "html"
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going"]
    command += ["-c", PLAIN, "-d", PLAIN / "doctrees", BOOK, html]
    built = subprocess.run(list(map(str, command)), check=False).returncode == 0
    if built:
        share_checkpoints(html)
        show_model(html)
    faults = project_faults(html)
    print("\n".join(["What the check of the pages says:", *(faults or ["nothing"])]))
    sys.exit(None if built and not faults else 1)


if __name__ == "__main__":
    main()
