# Everything runs in a virtual environment made here; nothing but python3 and make is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Not beside other tests: a cluster that gets no processor while it starts is given up by Ray.
RAY_TESTS := tests/test_ray.py tests/test_ray_cluster.py

.PHONY: demo test test-all test-milvus test-peers lint types docs bench wheel clean

demo: $(VENV)/.core
	$(BIN)/robustknn demo

test: $(VENV)/.dev
	$(PYTEST) -n 2 --dist worksteal -m "not slow and not milvus and not ray"
	$(PYTEST) -m "ray and not slow" $(RAY_TESTS)

test-all: $(VENV)/.dev
	$(PYTEST) -n 2 --dist worksteal -m "not milvus and not ray"
	$(PYTEST) -m ray $(RAY_TESTS)

test-milvus: $(VENV)/.milvus
	$(PYTEST) -m milvus tests/test_milvus_server.py

# What torchattacks and AutoAttack make of our classifiers; `make test` skips these.
test-peers: $(VENV)-peers/.ready
	MPLBACKEND=agg OMP_NUM_THREADS=1 $(VENV)-peers/bin/python -m pytest -rs tests/test_adapters.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

bench: $(VENV)/.bench
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

wheel: $(VENV)/.dev
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist site

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "python3 -m venv failed; install Python's venv module (Debian, Ubuntu: apt install python3-venv)."; exit 1; }

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[dev,docs,faiss,foolbox,art,milvus,ray,hf]'
	@touch $@

# The server is a program for Linux on x86-64; elsewhere its tests say that they are left out.
$(VENV)/.milvus: $(VENV)/.dev
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt milvus==2.3.5; fi
	@touch $@

# One after another: torchattacks wants an older `requests` than our constraints name.
$(VENV)-peers/.ready: pyproject.toml constraints.txt benchmarks/peers/requirements.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers/requirements.txt \
	  pytest hypothesis
	@touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[bench]'
	@touch $@
