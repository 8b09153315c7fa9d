"""From a page of text to a published book: parameters, fingerprints, execution, the gate, the site."""

from pathlib import Path


class BookError(Exception):
    """Something a person has to change: the message says what was given, what is accepted, and where."""


def __getattr__(name: str) -> Path:
    """`ROOT`, looked for when it is first needed: the folder above this package if it holds a book, else the nearest one
    upward from the working folder that does.

    Raises:
        BookError: if none of them holds `book/pages.yml`.
    """
    if name != "ROOT":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own, here = Path(__file__).resolve().parents[1], Path.cwd()
    for folder in (own, here, *here.parents):
        if (folder / "book" / "pages.yml").is_file():
            return folder
    raise BookError(f"no book here: neither {here} nor a folder above it holds book/pages.yml")
