# The arrows of the book: page → executed notebook → result store → results pages → site. `nsm-book build` runs them, one build
# at a time, and then lets _build/html be the new site. `nsm-book sweep` runs the last rule, and the pages that its page needs.
import math
import shlex
import sys

from nsm_book import fingerprint, schema, site, store, sweep
from nsm_book.workflow import rule_name

PROFILE = config.get("profile", "quick")
COMMAND = f"{shlex.quote(sys.executable)} -m nsm_book.cli".replace("{", "{{").replace("}", "}}")
PAGES = schema.pages()
RUNS = {name: page.run_file(PROFILE).relative_to(schema.ROOT) for name, page in PAGES.items()}
STORE = [path.relative_to(schema.ROOT) for path in fingerprint.store_files(PROFILE)]
CARD = site.card_file(PROFILE).relative_to(schema.ROOT)
BUILDING = workflow.is_main_process and "plan" not in config  # a sweep makes neither tables nor site


onstart:  # Snakemake's limit of jobs a second is meant for clusters, and lets it end only a second after its last job
    if workflow.local_exec:
        workflow.scheduler.job_rate_limiter = None


rule book:  # names every run: Snakemake does not miss a file that only stands between two others
    input:
        RUNS.values(),
        STORE,
        CARD,
    default_target: True


for name, page in PAGES.items():

    rule:
        name:
            rule_name(page)
        input:
            [f"_build/products/{PROFILE}/{product}" for product in page.needs],
            STORE if page.reads_results else [],
        output:
            update([RUNS[name], *(f"_build/products/{PROFILE}/{product}" for product in page.makes)]),
        threads: page.cores
        resources:
            mem_mb=page.memory,
            runtime=1 + math.ceil(page.budget[PROFILE] / 20),  # minutes: three times what it may take, and one to begin
        params:
            page=name,
            **fingerprint.dependencies(page, PROFILE),  # what has changed in these is why a page runs again
        shell:
            f"{COMMAND} execute {{params.page}} --profile {PROFILE}"


rule results:
    input:
        [RUNS[name] for name, page in PAGES.items() if not page.reads_results],
    output:
        update(STORE),
    params:
        catalogue=fingerprint.digest_of(store.catalogue(PROFILE)) if BUILDING else "",
        reruns=fingerprint.digest(store.rerun_record(PROFILE)),
    shell:
        f"{COMMAND} results --profile {PROFILE}"


rule site:
    input:
        RUNS.values(),
        STORE,
    output:
        update(CARD),
    params:
        ingredients=site.ingredients(PROFILE) if BUILDING else "",
    shell:
        f"{COMMAND} site --profile {PROFILE}"


if "plan" in config:  # a path, because Snakemake reads a sweep named `true` or `007` as something else
    FOLDER, NAME = config["plan"].rpartition("/")[0], config["plan"].split("/")[-2]
    PLAN = sweep.read_plan(NAME)
    PAGE = schema.page(PLAN["page"])

    rule sweep:
        input:
            [f"{FOLDER}/steps/{step}" for step in PLAN["steps"]],

    rule runs:  # a few runs of the sweep; what each leaves in its own folder is whole, and is not Snakemake's to remove
        input:
            [RUNS[maker.name] for maker in fingerprint.makers(PAGE)],
            [f"_build/products/{PROFILE}/{product}" for product in PAGE.needs],
        output:
            touch(f"{FOLDER}/steps/{{step}}"),
        threads: PAGE.cores
        resources:
            mem_mb=PAGE.memory * PLAN["at_once"],
            runtime=lambda wildcards: 1 + math.ceil(len(PLAN["steps"][wildcards.step]) * PAGE.budget[PROFILE] / 20),
        shell:
            f"{COMMAND} runs {NAME} {{wildcards.step}}"
