# make book    run every page and build the site (PROFILE=quick|full)      make check     lint, format, types and the fast tests
# make serve   open the site on loopback                                   make test      every test but the benchmarks
# make rerun   run every page once more and compare its numbers            make bench     the benchmarks
# make clean   remove every run and the site                               make notebooks pair .ipynb beside the pages
PROFILE ?= quick
PYTHON ?= python3
BIN := .venv/bin

FAST := not slow and not built and not kernel and not browser and not slurm

.PHONY: book check test rerun serve notebooks bench clean

book: .venv/installed
	@$(BIN)/nsm-book build --profile $(PROFILE)

.venv/installed: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}. Name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

check: .venv/installed
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "$(FAST)"

test: book
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup
	@$(MAKE) rerun

rerun: book
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.book.nbval_kernels --nbval-lax --nbval-current-env -n 2 --dist loadscope _build/runs/$(PROFILE)

serve: .venv/installed
	@test -e _build/html || { echo "There is no site yet: make book"; exit 1; }
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

notebooks: .venv/installed
	$(BIN)/jupytext --quiet --sync $$(grep -rl "formats: ipynb,md:myst" book --include="*.md")

bench: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/benchmarks

clean:
	rm -rf _build .snakemake
