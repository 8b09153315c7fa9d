"""The questions that were written down before the runs: `book/claims.yml`, held to its schema."""

import json
from typing import Any

from nsm_book import BookError
from nsm_book.pages import BOOK, pages, read_yaml, unknown
from nsm_support.results import verdict


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


def answer_keys(id: str) -> dict[str, str]:
    """Under which names a run glues its answer to a claim."""
    return {"estimate": id, **{field: f"{id}_{field}" for field in ("low", "high", "n", "verdict")}}


def unanswered(page: str, values: dict[str, dict[str, Any]], said: set[str]) -> list[str]:
    """What keeps a page's run from the ledger: a claim that it does not answer, not by its rule, or not in its prose.

    Args:
        values: what the run glued, `{name: {"value": …}}`.
        said: the names that its prose speaks.
    """
    found = []
    for entry in [entry for entry in read_yaml("claims.yml") if entry["page"] == page]:
        name = entry["id"]
        try:
            answer = {field: values[key]["value"] for field, key in answer_keys(name).items()}
        except KeyError as error:
            found.append(f"{page}: does not answer {name!r} of book/claims.yml: no cell glues {error}")
            continue
        word = answer.pop("verdict")
        try:
            right = verdict(entry["rule"], **answer)
        except (ValueError, TypeError) as error:
            found.append(f"{page}: its answer to {name!r} of book/claims.yml: {error}")
            continue
        if word != right:
            found.append(f"{page}: {name}_verdict is {word!r}, and the rule in book/claims.yml says {right!r}")
        if f"{name}_verdict" not in said:
            found.append(f"{page}: no sentence says how {name!r} came out: accepts {{glue:text}}`{name}_verdict`")
    return found
