"""What not every installation has."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports that the extra `name` brings. Raises ImportError saying how to install it where one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        wanted = f"{error.name} is not installed; the extra {name!r} brings it: pip install 'nsm-support[{name}]'"
        raise ImportError(wanted, name=error.name) from error
