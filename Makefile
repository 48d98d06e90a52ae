# Everything a developer or CI runs. `make` lists it.
PORT ?= 8080
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
JOBS ?= 2
# Weights of your own: make run MODEL_DIR=/path/to/model, or MODEL_ID=owner/name. Without: the demo model.
MODEL = $(if $(MODEL_DIR),MISTRAL_MODEL_DIR='$(MODEL_DIR)',$(if $(MODEL_ID),MISTRAL_MODEL_ID='$(MODEL_ID)',$(DEMO)))
DEMO = MISTRAL_MODEL_DIR="$$($(BIN)/python -m demo.make)"
SERVE = $(BIN)/python -m model_server --model_name mistral-7b --http_port $(PORT)

# The lock files name every package with its hashes, for each Python and platform.
COMPILE = $(BIN)/uv pip compile -q pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate \
  --custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade)

# A release on a cluster.
RELEASE ?= mistral-7b
NAMESPACE ?= mistral

.DEFAULT_GOAL := help
.PHONY: help run dev test test-avx2 oracle e2e fuzz check coverage bench bench-quick load soak gpu docs screenshots lock audit sbom dist version \
  release-check release-notes release-image release-chart image push manifests deploy undeploy

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | column -t -s '|'

run: .venv/installed ## serve the demo model, or MODEL_DIR=... or MODEL_ID=..., on PORT (8080)
	$(MODEL) exec $(SERVE)

dev: .venv/installed ## the same, restarted whenever a source file is saved
	$(MODEL) exec $(BIN)/watchfiles --filter python '$(SERVE) --drain_seconds 1' model_server

test: .venv/installed ## run the tests in two processes (JOBS=4: in four)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-avx2: .venv/installed ## run the tests of the computation as on a CPU without AVX-512
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -q tests/compute tests/loading tests/engine/test_oracle.py

oracle: .venv-oracle/installed ## compare prompts with those of mistral-common, in an environment of its own
	$(BIN)/python -m pytest tests/oracle

.venv-oracle/installed: tests/oracle/requirements.txt .venv/installed
	$(BIN)/uv venv -q --clear --python $(BIN)/python .venv-oracle
	$(BIN)/uv pip install -q --python .venv-oracle/bin/python -r $<
	touch $@

e2e: .venv/installed ## run tests/e2e on the cluster of the kube context E2E_CONTEXT (tests/e2e/README.md)
	$(BIN)/python -m pytest -s -v tests/e2e

fuzz: .venv/installed ## try thousands of requests on the server that runs on PORT, for five minutes (key: MISTRAL_API_KEY)
	$(BIN)/schemathesis run http://localhost:$(PORT)/openapi.json -H "Authorization: Bearer $${MISTRAL_API_KEY:-none}" \
	  --exclude-checks positive_data_acceptance --max-time 300 --continue-on-failure

check: .venv/installed ## what CI runs: format, lint, types, imports, tests (chart and manifests among them)
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/python -m charts.render_server --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

coverage: .venv/installed ## measure branch coverage, that of the servers that tests start included
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --cov --cov-report term:skip-covered

bench: .venv/installed ## run the benchmarks: about 12 minutes on a quiet machine
	$(BIN)/python -m benchmarks

bench-quick: .venv/installed ## the same in two minutes, and less exact
	$(BIN)/python -m benchmarks --quick

load: .venv/installed ## test a server under load and faults: 15 minutes on a quiet machine
	$(BIN)/python -m pytest -m load tests/load

soak: .venv/installed ## twenty minutes at full load with clients that disconnect
	SOAK_MINUTES=20 $(BIN)/python -m pytest -m load tests/load -k memory_stays_flat -o timeout=3000

gpu: .venv/installed ## the tests and figures that need a CUDA device: about 9 minutes on an H100 and memcheck; writes build/gpu.json and .md
	$(BIN)/python -m benchmarks.gpu

deploy: .venv/installed ## install or upgrade the release with Helm and wait: CONTEXT=... VALUES=... [RELEASE= NAMESPACE=]
	$(if $(CONTEXT),,$(error Name the kube context: make deploy CONTEXT=...))
	$(BIN)/helm upgrade --install $(RELEASE) charts/mistral-7b --kube-context $(CONTEXT) -n $(NAMESPACE) --create-namespace $(addprefix -f ,$(VALUES))
	$(BIN)/python -m mistral_cli rollout status $(RELEASE) --context $(CONTEXT) --namespace $(NAMESPACE) --wait 30m

undeploy: .venv/installed ## remove the release; a PVC with the weights stays: CONTEXT=... [RELEASE= NAMESPACE=]
	$(if $(CONTEXT),,$(error Name the kube context: make undeploy CONTEXT=...))
	$(BIN)/helm uninstall $(RELEASE) --kube-context $(CONTEXT) -n $(NAMESPACE) --wait --ignore-not-found

docs: .venv/installed ## build the documentation as a site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

screenshots: .venv/installed ## take the pictures of the playground from the server on PORT; needs Chromium
	$(BIN)/python -m docs.take_screenshots http://localhost:$(PORT)

lock: .venv/installed ## add what pyproject.toml misses to the lock files; UPGRADE=1 makes them anew
	$(COMPILE) --extra dev -o requirements-dev.lock
	$(COMPILE) --extra server --extra traces --constraint requirements-dev.lock -o requirements.lock

audit: .venv/installed ## look the locked packages of the server up in the databases of known vulnerabilities
	$(BIN)/pip-audit --strict --disable-pip --requirement requirements.lock

sbom: .venv/installed ## write build/sbom.json, the server's packages as a CycloneDX bill of materials
	mkdir -p build
	$(BIN)/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-file build/sbom.json

dist: ## build the Python package (wheel and source) in dist/
	test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/pip install -q --constraint requirements-dev.lock uv; }
	$(BIN)/uv build --quiet --out-dir dist

version: ## write VERSION into every file that has the version: make version VERSION=0.2.0
	$(PYTHON) .ci/release.py set "$(VERSION)"

release-check: ## check that TAG (v0.2.0), the files and the changelog name one version
	$(PYTHON) .ci/release.py check "$(TAG)"

release-notes: ## print the changelog's section of the version
	@$(PYTHON) .ci/release.py notes

release-image: ## build the image for TO (a registry, or oci:DIR on disk), and print it by digest
	@.ci/release-image "$(TO)" $(IMAGE)

release-chart: ## package the chart with IMAGE (by digest) inside, in build/release
	@$(PYTHON) .ci/release.py chart "$(IMAGE)" build/release

image: ## build the container image for linux/amd64 with docker, podman or buildah
	.ci/image

push: ## build it, push it to REGISTRY, and print its digest and the line that installs it
	.ci/image "$(REGISTRY)"

manifests: .venv/installed ## write what is generated: the flags in chart and docs, manifests/, the chart's README
	$(BIN)/python -m charts.render_server
	$(BIN)/python -m charts.render_manifests

# --no-deps: the lock file is complete, and pip would take the newest version of a package that another one requires with
# an extra, for which the lock file has no hash.
.venv/installed: requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-deps --require-hashes -r requirements-dev.lock && $(BIN)/pip install -q --no-deps -e . && touch $@
