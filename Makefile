PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Bytecode is kept, so that no worker and no process of a test translates all modules anew.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

SERVE := .venv-serve/bin
SERVE_PIP := $(SERVE)/pip install --quiet --disable-pip-version-check \
	--constraint constraints-serve.txt
PAGE := .venv-page/bin
PAGE_PIP := $(PAGE)/pip install --quiet --disable-pip-version-check \
	--constraint constraints-page.txt
SCALE := .venv-scale/bin
OLDEST := .venv-oldest/bin
SCHEMA := $(BIN)/check-jsonschema --quiet --builtin-schema
HERE := not serve and not page and not scale

.PHONY: demo pictures test test-quick test-all test-serve test-page test-scale test-oldest browser
.PHONY: coverage lint types format docs notebook bench clean

demo: .venv/.cpu
	$(BIN)/ccam-deploy export --recipe export/efficientnet_lite0.toml
	$(BIN)/ccam-deploy explain engines/efficientnet_lite0 export/examples --output demo
	$(BIN)/ccam-deploy compare engines/efficientnet_lite0 export/examples/cat.jpg \
		--output demo/cat-methods.png

pictures: demo
	$(BIN)/python -m bench.draw_photographs engines/efficientnet_lite0 --output docs/images

test: lint types test-serve test-page test-scale
	$(PYTEST) -m "not nightly and $(HERE)"

coverage: .venv/.all
	$(PYTEST) -m "not nightly and $(HERE)" --cov --cov-report=term

test-quick: .venv/.all
	$(PYTEST) -m "not slow and $(HERE)"

test-all: lint types test-serve test-page test-scale
	$(PYTEST) -m "$(HERE)" --cov --cov-report=term

test-serve: .venv-serve/.all .venv-serve/bundles/tiny
	OMP_NUM_THREADS=1 $(SERVE)/python -m pytest -m serve --bundles .venv-serve/bundles tests/serve

test-page: .venv-page/.all .venv-page/bundles/digits browser
	OMP_NUM_THREADS=1 $(PAGE)/python -m pytest -m page --bundles .venv-page/bundles tests/page

test-scale: .venv-scale/.all .venv-scale/bundles/digits
	OMP_NUM_THREADS=1 $(SCALE)/python -m pytest -m scale --bundles .venv-scale/bundles \
		tests/scale tests/bench/test_batch.py

test-oldest: .venv-oldest/.all
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -n 2 --dist worksteal -m "not nightly" tests/export

browser:
	@{ command -v chromium || command -v google-chrome; } > /dev/null \
			&& command -v chromedriver > /dev/null \
		|| { test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
			&& apt-get update --quiet --quiet \
			&& apt-get install --quiet --yes --no-install-recommends chromium chromium-driver; } \
		|| echo "chromium and chromium-driver are missing: tests of the page are skipped" >&2

lint: .venv/.all docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(SCHEMA) vendor.github-workflows .github/workflows/ci.yml
	$(SCHEMA) vendor.compose-spec deploy/compose.yaml
	$(SCHEMA) vendor.citation-file-format --default-filetype yaml CITATION.cff

types: .venv/.all
	$(BIN)/mypy

format: .venv/.all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.all
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

notebook: .venv/.all
	$(PIP) --editable '.[notebook]'
	$(BIN)/python -m nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False --log-level=WARN docs/notebooks/tour.ipynb

bench: .venv/.all
	$(BIN)/python -m bench.bench_overhead --output bench/results/overhead-cpu.json
	$(BIN)/python -m bench.bench_forwards --output bench/results
	$(BIN)/python -m bench.bench_table2 --rounds 10 --duration 5 \
		--methods collection-cam,grad-cam,grad-cam++,layer-cam --output bench/results
	$(BIN)/python -m bench.bench_export --output bench/results/export-cpu.json

clean:
	rm -rf .venv .venv-serve .venv-page .venv-scale .venv-oldest demo site engines/efficientnet_lite0 .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

.venv/bin/python .venv-serve/bin/python .venv-page/bin/python .venv-scale/bin/python \
		.venv-oldest/bin/python:
	$(PYTHON) -m venv $(@:/bin/python=)

.venv/.cpu: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[export,cpu,imagenet]'
	touch $@

.venv/.all: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[export,cpu,cuda,rtx,plot,scenes,proposals,imagenet,sign,zoo,test,lint,docs]'
	touch $@ .venv/.cpu

.venv-serve/.all: pyproject.toml constraints-serve.txt | .venv-serve/bin/python
	$(SERVE_PIP) --editable '.[cpu,serve]' hypothesis psutil pytest
	touch $@

.venv-page/.all: pyproject.toml constraints-page.txt | .venv-page/bin/python
	$(PAGE_PIP) --editable '.[cpu,demo]' hypothesis psutil pytest selenium
	touch $@

.venv-scale/.all: pyproject.toml constraints.txt | .venv-scale/bin/python
	$(SCALE)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[cpu,scale]' hypothesis psutil pytest
	touch $@

# Without CUDA's Python packages: that PyTorch asks for older ones.
.venv-oldest/.all: pyproject.toml constraints.txt | .venv-oldest/bin/python
	grep -v -E '^(torch|torchvision|numba-cuda|cuda-[a-z]*)==' constraints.txt \
		> .venv-oldest/constraints.txt
	$(OLDEST)/pip install --quiet --disable-pip-version-check \
		--constraint .venv-oldest/constraints.txt 'torch==2.10.*' 'torchvision==0.25.*' \
		--editable '.[export,cpu,rtx,plot,scenes,imagenet,zoo,test]'
	touch $@

.venv-serve/bundles/tiny: tests/networks.py
.venv-page/bundles/digits .venv-scale/bundles/digits: export/digits.toml
.venv-serve/bundles/tiny .venv-page/bundles/digits .venv-scale/bundles/digits: \
		.venv/.all tests/bundles.py
	rm -rf $@
	mkdir -p $(@D)
	$(BIN)/python -m tests.bundles $(@F) $@
	touch $@
