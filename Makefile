# Every target says what it needs. Python 3.11 and a package registry are enough for all but
# `chromium`, which wants Debian's apt and root (the browser tests skip, with a reason, without it).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# uv reads neither pip's find-links nor its certificate setting; hand them on where they are set.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
ifneq ($(PIP_CERT),)
export SSL_CERT_FILE ?= $(PIP_CERT)
endif

# Where the environment forbids bytecode (as many containers do), each process that loads the
# network compiles 200 packages for itself: 20 s of CPU instead of 1.
unexport PYTHONDONTWRITEBYTECODE

# Tests of one file, and all that share a server, stay in one process; half of them mostly wait.
CORES := $(shell nproc 2>/dev/null || echo 2)
SPREAD := --dist loadscope --no-loadscope-reorder
# Several targets at once, each shown when it is done.
TOGETHER := $(MAKE) --no-print-directory -j4 --output-sync=target

.PHONY: help setup demo check explore fast lint ruff mypy imports odd docs test chromium label-studio azurite \
	review-demo review-demo-stop installs lock gpu chaos chaos-review chaos-train gates fuzz audit clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

setup: $(READY)  ## a virtual environment with everything (2 GB); nothing to do the second time

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "labelfleet needs Python 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==0.13.9

$(READY): pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	touch $(READY)

demo: $(READY)  ## label 300 pages of handwritten digits on this machine, and look at the report
	$(BIN)/labelfleet demo runs/demo

review-demo: $(READY) label-studio  ## the demo run's review queue in a Label Studio on this machine
	test -f runs/demo/run/run.json || $(BIN)/labelfleet demo runs/demo
	$(BIN)/python examples/review/demo.py start runs/demo

review-demo-stop:  ## end that Label Studio
	$(BIN)/python examples/review/demo.py stop runs/demo

azurite: .azurite/.ready  ## Microsoft's emulator of Azure storage, for the az:// tests (needs node)

.azurite/.ready:
	@command -v npm >/dev/null || { echo "no npm here: the az:// tests will skip"; exit 0; }; \
		mkdir -p .azurite && cd .azurite && npm install --silent --no-audit --no-fund \
		azurite@3.37.0 && touch .ready || echo "azurite cannot be had: the az:// tests will skip"

label-studio: .venv-label-studio/.ready  ## Label Studio (1 GB) in an environment of its own, for review

.venv-label-studio/.ready: | $(BIN)/uv
	test -x .venv-label-studio/bin/python || $(PYTHON) -m venv .venv-label-studio
	$(BIN)/uv pip install --quiet --python .venv-label-studio/bin/python label-studio==1.23.2
	rm -f .venv-label-studio/migrated.sqlite3
	touch $@

lint: ruff mypy imports docs  ## ruff, mypy --strict, import-linter, links in docs/

ruff: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

mypy: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

docs: .venv-docs/.ready $(READY)  ## the documentation site, in build/site; a broken link fails
	.venv-docs/bin/sphinx-build -q -E -n -W --keep-going -b html docs build/site
	mkdir -p build/site/schemas
	for kind in run train; do \
		$(BIN)/labelfleet schema $$kind > build/site/schemas/$$kind.schema.json || exit; done

# --no-config: the project's overrides drop Sphinx, which super-gradients asks for.
.venv-docs/.ready: Makefile | $(BIN)/uv
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	$(BIN)/uv pip install --no-config --quiet --python .venv-docs/bin/python \
		sphinx==9.0.4 furo==2025.12.19 myst-parser==5.2.0
	touch $@

fast: $(READY)  ## the fast tests
	$(BIN)/pytest -q -m "not slow" -n $(CORES) $(SPREAD)

check:  ## lint and the fast tests, side by side: before every commit
	@$(TOGETHER) fast lint

test:  ## everything: real Ray, S3 servers, Label Studio and browser
	@LABELFLEET_HYPOTHESIS=thorough $(TOGETHER) fast lint chromium label-studio
	$(BIN)/pytest -q -m slow -n $$(( $(CORES) + 1 )) $(SPREAD)

odd: $(READY)  ## what must work with LANG=C and any HOME: the fast tests, a notebook's two runs
	$(BIN)/pytest -q -m "not slow" -n $(CORES) $(SPREAD)
	$(BIN)/pytest -q tests/pipelines/face tests/pipelines/cluster/test_ray_cluster.py

chromium:  ## Debian's Chromium for the browser tests, if it can be had
	@command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq chromium chromium-driver >/dev/null; } \
		|| echo "no chromium here and no way to install it: the browser tests will skip"

# GPU_PYTHON: an environment that is there already (another torch); nothing is installed then.
gpu: $(if $(GPU_PYTHON),,$(READY))  ## on a machine with an NVIDIA GPU: its tests and figures, 12 minutes; GPU='--dry-run'
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu_day $(GPU)

chaos: $(READY)  ## 100 seeded schedules of kills and storage faults over a real small run
	$(BIN)/python -m tests.chaos.campaign --seeds $(or $(SEEDS),100)
	$(BIN)/python -m tests.chaos.nights --seeds $(or $(SEEDS),200)
	$(BIN)/python -m tests.chaos.raylets --seeds $(or $(SEEDS),12)

chaos-review: $(READY) label-studio  ## 200 seeded schedules of faults between us and Label Studio (half an hour)
	LABELFLEET_CHAOS=200 $(BIN)/pytest -q tests/e2e/test_review_faults.py

chaos-train: $(READY)  ## 10 seeded schedules of kills over a small training on two workers
	$(BIN)/python -m tests.chaos.training --seeds $(or $(SEEDS),10)

installs: $(READY)  ## every way to install, each in an empty environment (5 GB of downloads)
	LABELFLEET_LONG=1 $(BIN)/pytest -q -n 0 -m slow tests/e2e/test_install.py

# One lock for each set: names and versions alone, so that any index serves it.
lock: $(READY)  ## requirements/*.txt, the versions that the tests ran with
	for set in core run full; do extra=$${set#core}; \
		$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
			--no-emit-index-url --no-emit-find-links $${extra:+--extra $$extra} \
			$$([ $$set = full ] && echo --extra openvino) \
			pyproject.toml -o requirements/$$set.txt >/dev/null || exit; done
	grep -E '^(super-gradients|data-gradients)==' requirements/full.txt > requirements/super-gradients.txt

gates: $(READY)  ## the model gate on real sets, each setting broken on purpose (half an hour)
	LABELFLEET_LONG=1 $(BIN)/pytest -q -n 0 -m slow tests/pipelines/models/test_gate_trials.py

fuzz: $(READY)  ## 38,000 damaged images, tars, zips, configs, Parquet files, answers and checkpoints
	$(BIN)/python -m tests.support.fuzz.campaign $(FUZZ)

explore: $(READY)  ## the property tests, with examples drawn anew
	LABELFLEET_HYPOTHESIS=explore $(BIN)/pytest -q -m "not slow" -n $(CORES) $(SPREAD) \
		$$(grep -rl --include='test_*.py' '^@given' tests)

audit: .venv-audit/.ready  ## known vulnerabilities of all that is installed; needs PyPI's own service
	@mkdir -p build
	@$(BIN)/uv pip freeze --quiet --exclude-editable --python $(BIN)/python \
		| sed -n 's/^\([^ @]*==[^+ ]*\).*/\1/p' > build/audit.txt
	@code=0; .venv-audit/bin/pip-audit --no-deps --disable-pip --progress-spinner off \
		--requirement build/audit.txt $(AUDIT) 2> build/audit.log || code=$$?; \
	if grep -q 'known vulnerabilities' build/audit.log; then grep vulnerabilities build/audit.log; \
		exit $$code; fi; tail -n 1 build/audit.log; \
	echo "audit: NOT DONE: the vulnerability service did not answer for the" \
		"$$(wc -l < build/audit.txt) packages in build/audit.txt. Run make audit where pypi.org can" \
		"be reached (or AUDIT='--vulnerability-service osv', for osv.dev)."; exit 69

.venv-audit/.ready: $(READY)
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	$(BIN)/uv pip install --quiet --python .venv-audit/bin/python pip-audit==2.10.1
	touch $@

clean:  ## remove what the targets above made
	rm -rf $(VENV) .venv-label-studio .venv-audit .venv-docs runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
