"""The questions that were written down before the runs: `book/claims.yml`, held to its schema."""

import json
from typing import Any

from nsm_support.book import BookError
from nsm_support.book.pages import BOOK, pages, read_yaml, unknown


def check() -> list[dict[str, Any]]:
    """All claims, in order, if the file keeps to `book/claims.schema.json`.

    Raises:
        BookError: naming the entry and what is wrong with it.
    """
    import jsonschema

    entries = read_yaml("claims.yml")
    schema = json.loads((BOOK / "claims.schema.json").read_text())
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(entries))
    if error:
        raise BookError(f"book/claims.yml: {'/'.join(map(str, error.absolute_path)) or 'file'}: {error.message}")
    ids = [entry["id"] for entry in entries]
    for entry in entries:
        if ids.count(entry["id"]) > 1:
            raise BookError(f"book/claims.yml: {entry['id']} stands there twice")
        if entry["page"] not in pages():
            raise BookError(f"book/claims.yml: {entry['id']}: {unknown('page', entry['page'], pages())}")
    return entries
