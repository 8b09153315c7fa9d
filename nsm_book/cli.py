"""`nsm-book`: build the book, run one page or a table of runs, ask what a page accepts and why it would rerun."""

import os
import sys
from pathlib import Path

import click

from nsm_book import BookError

PROFILES = click.Choice(["quick", "full"])
PROFILE = click.option(
    "--profile", type=PROFILES, default="quick", show_default=True, help="quick: a run of seconds; full: the published numbers."
)


class Commands(click.Group):
    """A group whose commands tell a person's mistake in one message, without a traceback."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except BookError as error:
            click.echo(f"nsm-book: {error}", err=True)
            sys.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """The book of neural state machines: build it, rerun its pages, ask about them."""


@main.command()
@PROFILE
@click.option("--cores", type=click.IntRange(1), default=os.cpu_count(), show_default="all", help="Cores that pages may use.")
def build(profile, cores):
    """Run what changed and publish the site to _build/html."""
    from rich.console import Console

    from nsm_book.workflow import build

    site = build(profile, cores, Console(soft_wrap=True))
    click.echo(f"The book ({profile} profile) is ready. Open {site / 'index.html'}")


@main.command()
@click.argument("page")
@click.option("-p", "given", nargs=2, multiple=True, metavar="NAME VALUE", help="A parameter; may be given again.")
@click.option(
    "-o",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="DIR",
    help="Where the run's own folder is made.",
)
@click.option("--profile", type=PROFILES, default="full", show_default=True, help="The values of all other parameters.")
def run(page, given, folder, profile):
    """Run one page with other parameters."""
    from nsm_book import schema
    from nsm_book.run import rerun

    entry = schema.page(page)
    twice = {name for name, _ in given if [other for other, _ in given].count(name) > 1}
    if twice:
        raise BookError(f"{entry.name}: parameter {schema.brief(min(twice))} is given more than once")
    schema.check_parameters(entry, dict(given))
    place = rerun(entry, dict(given), profile, folder)
    click.echo(f"{place / 'run.ipynb'}\n{place / 'results.json'}")


@main.command()
@click.argument("name")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=os.cpu_count(),
    show_default="all cores",
    help="Cores that runs may use, or jobs at once with --profile-dir.",
)
@click.option(
    "--profile-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="A Snakemake profile that says where the runs run, such as profiles/slurm; by default on this machine.",
)
def sweep(name, jobs, profile_dir):
    """Run what is missing of book/sweeps/NAME and collect it into _build/sweeps/NAME.parquet."""
    from rich.console import Console

    from nsm_book.sweep import run

    click.echo(run(name, jobs, profile_dir, Console(soft_wrap=True)))


@main.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
def diff(first, second):
    """Compare two result stores: profiles, sweeps, results.json or .parquet files, folders of runs.

    Exit code 0: no verdict changed and no value moved beyond its interval in A; 1: some did; 2: refused.
    """
    from rich.console import Console

    from nsm_book import diff
    from nsm_book.compared import read_store

    try:
        found = diff.compare(read_store(first), read_store(second))
    except BookError as error:
        click.echo(f"nsm-book: {error}", err=True)
        sys.exit(2)
    diff.show(found, first, second, Console(width=None if sys.stdout.isatty() else 160))
    sys.exit(found.matters)


@main.command()
@click.argument("page", required=False)
def params(page):
    """List the parameters of a page, or of every page: type, default, meaning."""
    from rich.console import Console
    from rich.table import Table

    from nsm_book import schema

    for entry in [schema.page(page)] if page else schema.pages().values():
        table = Table("name", "type", "default", "meaning", title=entry.name, title_justify="left", box=None)
        for p in schema.parameters(entry).values():
            table.add_row(p.name, p.type.replace("[", "\\["), repr(p.default).replace("[", "\\["), p.meaning)
        Console().print(table, "")


@main.command()
@click.argument("page")
@PROFILE
def why(page, profile):
    """Say why a page would run again."""
    from nsm_book import fingerprint, schema

    entry = schema.page(page)
    reasons = [f"{entry.name} would run again: {reason}" for reason in fingerprint.differences(entry, profile)]
    click.echo("\n".join(reasons) or f"{entry.name} is up to date in the {profile} profile")


@main.command()
@PROFILE
@click.option("--commit", required=True, help="The commit that the site has to be made from.")
def verify(profile, commit):
    """Refuse a built site that is not whole, or not of this profile and commit."""
    from nsm_book import site

    click.echo(f"whole and new: {site.verify(profile, commit)} pages")


# The steps of the build and of sweeps, which Snakemake calls.


@main.command(hidden=True)
@click.argument("page")
@PROFILE
def execute(page, profile):
    """Bring one page of a profile up to date."""
    from nsm_book import run, schema

    click.echo(f"{run.DONE}{run.execute(schema.page(page), profile)}")


@main.command(hidden=True)
@PROFILE
def results(profile):
    """Read all runs of a profile back into the result store."""
    from nsm_book import fingerprint, run, store

    with run.reasons_kept(fingerprint.store_files(profile)[0]):
        click.echo(f"{run.DONE}{store.write(profile)}")


@main.command("site", hidden=True)
@PROFILE
def render_site(profile):
    """Render the site of a profile."""
    from nsm_book import run, site

    with run.reasons_kept(site.card_file(profile)):
        click.echo(f"{run.DONE}{site.publish(profile)}")


@main.command(hidden=True)
@click.argument("name")
@click.argument("step")
def runs(name, step):
    """Make the runs of one step of a sweep's plan."""
    from nsm_book import sweep

    sweep.run_step(name, step)


if __name__ == "__main__":
    main()
