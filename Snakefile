# The arrows of the book: page → executed notebook → results → site. `make book` runs them; so does
# `snakemake --cores 2 --config profile=full`, here or, with an executor plugin, on a cluster.
import sys

from nsm_support.book import fingerprint, pages, stage

PROFILE = config.get("profile", "quick")
COMMAND = f"{sys.executable} -m nsm_support.book.cli"
RUNS = {name: page.run(PROFILE).relative_to(pages.ROOT) for name, page in pages.pages().items()}

if workflow.is_main_process:
    fingerprint.set_aside_stale(PROFILE)


rule book:  # names every run: Snakemake does not miss a file that only stands between two others
    input:
        RUNS.values(),
        f"_build/sites/{PROFILE}.json",
    default_target: True


for name, page in pages.pages().items():

    rule:
        name:
            f"page: {name}"
        input:
            [f"_build/products/{PROFILE}/{product}" for product in page.needs],
        output:
            update([RUNS[name], *(f"_build/products/{PROFILE}/{product}" for product in page.makes)]),
        resources:
            mem_mb=page.memory,
            runtime=max(1, round(page.budget[PROFILE] / 20)),
        params:
            page=name,
        shell:
            f"{COMMAND} execute {{params.page}} --profile {PROFILE}"


rule collect:
    input:
        RUNS.values(),
    output:
        f"_build/results/{PROFILE}/results.json",
        f"_build/results/{PROFILE}/results.parquet",
    shell:
        f"{COMMAND} collect --profile {PROFILE}"


rule site:
    input:
        RUNS.values(),
        rules.collect.output,
        "_config.yml",
        "_toc.yml",
        [path for path in stage.prose()],
        [str(path) for path in sorted(pages.ROOT.glob("nsm_support/**/*.py"))],
    output:
        f"_build/sites/{PROFILE}.json",
    shell:
        f"{COMMAND} site --profile {PROFILE}"
