# make quickstart: the whole pipeline, end to end. make test: all quick tests. Both install first if that is not done.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install quickstart laptop test test-all bench clean

# The first of these that is Python 3.11 or 3.12; `make install PYTHON=python3.11` chooses another.
SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

BIN := .venv/bin
STAMP := .venv/installed
SHIPPED := weights/laptop

# $(call phase,TITLE,COMMAND): run it and say how long it took.
define phase
@start=$$(date +%s); echo "== $(1)"; $(2); code=$$?; \
if [ $$code -ne 0 ]; then echo "== $(1): stopped after $$(( $$(date +%s) - start )) s with exit status $$code"; exit $$code; fi; \
echo "== $(1): $$(( $$(date +%s) - start )) s"
endef

# $(call pipeline,RECIPE,RUN): every phase of a recipe. What is done already is skipped or continued.
define pipeline
$(call phase,1/7 fetch assets,$(BIN)/unicom data fetch $(1))
$(call phase,2/7 ingest images,$(BIN)/unicom data ingest $(1))
$(call phase,3/7 encode images,$(BIN)/unicom features run $(1))
$(call phase,4/7 train,$(BIN)/unicom train $(1))
$(call phase,5/7 draw,$(BIN)/unicom sample $(2) --skip-done)
$(call phase,6/7 evaluate,$(BIN)/unicom eval $(2) --suite quick --skip-done)
$(call phase,7/7 report,$(BIN)/unicom report $(2))
endef

help:
	@echo "make quickstart   fetch, ingest, encode, train, draw, evaluate, report: about 15 minutes on 2 cores"
	@echo "make test         ruff, mypy, import rules, quick tests"
	@echo "make test-all     the slow tests too"
	@echo "make laptop       the same pipeline for longer: about an hour on 2 cores, minutes on a GPU"
	@echo "make bench        side-by-side measurements into benchmarks/results"
	@echo "make install      only .venv with the package and its test tools (PYTHON=python3.11 chooses the Python)"

install: $(STAMP)
	@echo "== .venv: $$($(BIN)/python --version)"

$(STAMP): setup.cfg pyproject.toml
	@if ! command -v "$(PYTHON)" >/dev/null; then \
	  echo "no Python 3.11 or 3.12 found$(if $(PYTHON),: there is no $(PYTHON)) (python3 is $$(python3 --version 2>&1))"; \
	  echo "  fix:  install one, or name it: make install PYTHON=/path/to/python3.12"; exit 3; fi
	@$(PYTHON) -c '$(SUPPORTED)' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), and only Python 3.11 and 3.12 are supported"; \
	  echo "  fix:  make install PYTHON=python3.12"; exit 3; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments"; echo "  fix:  install python3-venv (Debian, Ubuntu)"; exit 3; }
	@start=$$(date +%s); echo "== install into .venv with $$($(PYTHON) --version) (some minutes, some gigabytes)"; \
	version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	clear=; if [ -d .venv ] && [ ! -d ".venv/lib/python$$version" ]; then clear=--clear; fi; \
	$(PYTHON) -m venv $$clear .venv && \
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]' && touch $@ && \
	echo "== install: $$(( $$(date +%s) - start )) s"

quickstart: install
	@date +%s > .venv/started
	$(call pipeline,recipes/quickstart.yaml,runs/quickstart)
ifneq ($(wildcard $(SHIPPED)/model_index.json),)
	$(call phase,the same prompts from the shipped laptop model,$(BIN)/unicom sample $(SHIPPED) "smiling face" "flag: Japan" "woman standing" "blue square" "red heart" "cat face" "stop button" "pizza" --out runs/quickstart/pictures-of-the-laptop-model --skip-done)
endif
	@echo "== quickstart: $$(( $$(date +%s) - $$(cat .venv/started) )) s; open runs/quickstart/report.html"

laptop: install
	$(call pipeline,recipes/laptop.yaml,runs/laptop)

test: install
	$(call phase,ruff,$(BIN)/ruff check .)
	$(call phase,mypy,$(BIN)/mypy)
	$(call phase,import rules,$(BIN)/lint-imports)
	$(call phase,tests,$(BIN)/python -m pytest -m "not slow and not gpu")

test-all: install
	$(call phase,ruff,$(BIN)/ruff check .)
	$(call phase,mypy,$(BIN)/mypy)
	$(call phase,import rules,$(BIN)/lint-imports)
	$(call phase,slow tests and all others,$(BIN)/python -m pytest)

bench: install
	$(call phase,peers,$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[bench]')
	@missed=; for bench in benchmarks/bench_*.py; do \
	  echo "== $$bench"; $(BIN)/python $$bench || missed="$$missed $${bench#benchmarks/}"; done; \
	if [ -n "$$missed" ]; then echo "== bench: not every goal met, or not run to its end:$$missed"; exit 1; fi

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
