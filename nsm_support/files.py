"""Files that are written whole or not at all: a reader, or a crash, meets the old one or the new one and nothing between."""

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike[str], content: str | bytes | memoryview) -> None:
    """Write bytes, or text as UTF-8 with its line ends as they are. Raises OSError, and then leaves the file of before."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_whole(path, json.dumps(content, ensure_ascii=False, allow_nan=False))
