"""Sphinx extension: leaves out the scripts of Thebe, which Jupyter Book adds and nothing here uses.

They stand on every page twice, and the second one is an error in the reader's browser.
"""

EVENTS = ("env-before-read-docs", "doctree-resolved")


def disconnect(app):
    """Take the listeners of sphinx-thebe away, where Jupyter Book has brought it."""
    for event in EVENTS:
        for listener in [*app.events.listeners[event]]:
            if listener.handler.__module__ == "sphinx_thebe":
                app.disconnect(listener.id)


def setup(app):
    app.connect("builder-inited", disconnect)
    return {"parallel_read_safe": True}
