"""`reference/parameters`: every parameter of every page, and what the quick profile makes of it."""

from nsm_book.markup import raw, table
from nsm_book.schema import pages, parameters, profile_parameters, title


def parameter_page() -> str:
    """The text of the page."""
    lines = [
        "# Parameters",
        "",
        "Every executable page can be run with other values: "
        "`nsm-book run PAGE -p NAME VALUE -o DIR`. The default is the published value; "
        "the quick profile changes the ones in its column.",
        "",
    ]
    for entry in pages().values():
        quick = profile_parameters(entry, "quick")
        rows = [
            [p.name, p.type, repr(p.default), repr(quick[p.name]) if p.name in quick else "–", p.meaning]
            for p in parameters(entry).values()
        ]
        lines += [
            f"## {title(entry)}",
            "",
            f"`nsm-book run {entry.name}`",
            "",
            raw(table(["name", "type", "default", "quick", "meaning"], rows, f"Parameters of {entry.name}")),
            "",
        ]
    return "\n".join(lines)
