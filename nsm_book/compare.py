"""`results/compare`: each sweep as lines with intervals, as a heatmap and as a table; every point leads to its notebook."""

import html

from nsm_book.markup import Cell, folded, raw, table
from nsm_book.series import Choice, choices, measured, measures, point, settings, told, told_apart, value_of, varied
from nsm_book.sweep_table import sweeps
from nsm_book.swept import MOST_RUNS, Row, Swept, read_all

MOST_FRAMES = 4_000  # choices of parameters times measures
MOST_POINTS = 50_000  # of all frames together
MOST_PLACES = 5_000  # settings that a drawing has room for


def summary(rows: list[Row], first: str | None) -> tuple[list[Choice], list[str], int]:
    """The choices and measures that the page draws, `first` before all others if a run has it (an earlier version of the
    page may not), and how many choices it leaves to the table.
    """
    all_choices, names = choices(rows), measures(rows)
    if first is not None and any(measured(row, first) is not None for row in rows):
        names = [first, *(name for name in names if name != first)]
    frames = min(MOST_FRAMES, MOST_POINTS // settings(rows))
    names = names[: max(1, frames)]
    kept = all_choices[: max(1, frames // len(names))]
    return kept, names, len(all_choices) - len(kept)


def sweep_part(swept: Swept, number_of: int) -> list[str]:
    """The section of one sweep."""
    from nsm_book import drawings

    rows = [row for row in swept.rows if row.status == "done"]
    failed, old = len(swept.rows) - len(rows), sum(not row.today for row in rows)
    asked = [raw(f'<p class="nsm-question">{html.escape(swept.question)}</p>'), ""] if swept.question else []
    lacking = "".join(f"; {count} {what}" for count, what in ((failed, "failed"), (swept.missing, "not tried yet")) if count)
    lines = [
        f"## The sweep `{swept.name}`",
        "",
        *asked,
        f"{len(rows)} runs of [](../{swept.page.name}.md), in the {swept.rows[0].profile} profile{lacking}. "
        f"`nsm-book sweep {swept.name}` runs what is missing.",
        "",
    ]
    if swept.large:
        lines += [
            f"These are more than {MOST_RUNS} runs: they are drawn, and neither listed nor linked. All lie in "
            f"`_build/sweeps/{swept.name}.parquet`.",
            "",
        ]
    elif old:
        lines += [f"**{old} of these runs are of an earlier version of the page**: the same command brings them up to date.", ""]
    if not rows:
        return lines
    if settings(rows) > MOST_PLACES:
        return [*lines, f"More than {MOST_PLACES} settings are not drawn.", ""]
    kept, names, left = summary(rows, swept.measure)
    if left:
        lines += [f"{left} settings with the fewest runs are not drawn; the table has all.", ""]
    if len(names) < len(measures(rows)):
        lines += [f"{len(names)} of {len(measures(rows))} measures are drawn; the table has all.", ""]
    for figure in drawings.drawings(swept, rows, kept, names, f"sweep-{number_of}"):
        lines += [raw(figure), ""]
    if settings(rows) < len(rows):
        lines += [raw(mean_table(swept, rows, names)), ""]
    return lines if swept.large else [*lines, raw(run_table(swept, names)), ""]


def mean_table(swept: Swept, rows: list[Row], names: list[str]) -> str:
    """Every setting, with mean and interval of every measure over the runs that differ by their seed alone."""
    given, places = varied(rows), {}
    for row in rows:
        places.setdefault(tuple(value_of(row, name) for name in given), []).append(row)
    body = [[*place, str(len(there)), *(told(point(there, name)) for name in names)] for place, there in places.items()]
    label = f"Settings of the sweep {swept.name}, with mean and interval of every measure"
    return folded(f"Means and intervals of {len(body)} settings as a table", table([*given, "runs", *names], body, label))


def run_table(swept: Swept, names: list[str]) -> str:
    """Every run, with every measure and the interval that the run itself reports."""
    given, rows = told_apart(swept.rows), []
    for row in swept.rows:
        rows.append(
            [
                Cell(row.id, swept.notebook(row), swept.place(row)),
                row.status,
                *(value_of(row, name) for name in given),
                *(told(point([row], name)) for name in names),
            ]
        )
    head = ["executed notebook", "status", *given, *names]
    return folded(f"All {len(rows)} runs as a table", table(head, rows, f"Runs of the sweep {swept.name}, with every measure"))


def compare_page() -> str:
    """The text of the page."""
    found = read_all()
    waiting = [name for name in sweeps() if name not in {swept.name for swept in found}]
    lines = [
        "# Compare runs",
        "",
        "A sweep runs one page with many values of its parameters: `nsm-book sweep NAME`. Each sweep below is drawn from "
        "its own runs: choose what lies along the axis, what has a line of its own, and which of the page's numbers is "
        "measured. Every point leads to the notebook that was executed for it, or, where it is a mean, to the first of "
        "its runs in the table. What a number means, its page says: look for its name there.",
        "",
    ]
    for index, swept in enumerate(found, start=1):
        lines += sweep_part(swept, index)
    if waiting:
        lines += [
            "## Not run yet",
            "",
            "These tables of runs lie in `book/sweeps`; each line runs one, and the next `make book` draws it here.",
            "",
            "```bash",
            *(f"nsm-book sweep {name}" for name in waiting),
            "```",
            "",
        ]
    if not found and not waiting:
        lines += ["There is no sweep in `book/sweeps` yet.", ""]
    return "\n".join(lines)
