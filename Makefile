# Two commands do it all: `make demo` and `make test`. Both stand on `make install`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch has a CPU build of its own index; on other platforms the plain one.
TORCH := torch==2.13.0
DATA ?= ../shared/data/gtsrb
FUZZ_SECONDS ?= 60
# Processes that run tests. Each computes with one thread: more would wait for one another.
TESTERS ?= 2
# Of the training of each comparator; without a GPU, give it hours.
SECONDS_EACH ?= 240

.PHONY: help install demo test test-full fuzz lint train comparators wheel clean

help:
	@echo "make demo       install, export, archive, serve, and show attacked signs being read right again"
	@echo "make test       install, lint, type-check, run the tests"
	@echo "make test-full  the tests on full-size models as well (hours, 16 GB)"
	@echo "make fuzz       fuzz the request parser and the image decoder, each for FUZZ_SECONDS=$(FUZZ_SECONDS)"
	@echo "make train      train the default model anew from DATA=$(DATA), into build/road-signs-model"
	@echo "make comparators  train the defences to compare with, SECONDS_EACH=$(SECONDS_EACH), into build/comparators"
	@echo "make wheel      build/mlvgm_serve-*.whl, with the default model in it, to install elsewhere"
	@echo "make clean      remove what was built"

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "mlvgm-serve needs Python 3.10 or newer: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV), which takes some minutes: PyTorch ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@echo '... ONNX Runtime, OpenVINO, TorchServe with Java ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[torch,cpu,serve,dev-server,attack]'
	@touch $@

$(VENV)/.installed-for-tests: $(VENV)/.installed
	@echo 'Installing TensorRT for RTX, Ray, Gradio, and what the tests need ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[torch,cpu,rtx,serve,dev-server,scale,playground,attack,dev]'
	@touch $@

demo: install
	@$(BIN)/python -m mlvgm demo

lint: $(VENV)/.installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTERS) --dist loadfile

test-full: $(VENV)/.installed-for-tests
	$(BIN)/python -m pytest -m "full or not full"

fuzz: $(VENV)/.installed-for-tests
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	for target in request image; do $(BIN)/python -m tests.fuzz.$$target -max_total_time=$(FUZZ_SECONDS) || exit 1; done

train: install
	$(BIN)/python -m mlvgm.training.classifier --data $(DATA) --out build/road-signs-model
	$(BIN)/mlvgm train $(DATA)/train.npz --settings model_store/road-signs/training.yaml --out build/road-signs-model

comparators: install
	for name in pgd trades another smoothed avae ndvae; do \
	  $(BIN)/python -m evaluation.comparators train $$name $(DATA)/train.npz --out build/comparators --seconds $(SECONDS_EACH) || exit 1; done

# What an earlier build left would be packed as well.
wheel: $(VENV)/.installed-for-tests
	rm -rf build/setuptools build/mlvgm_serve-*.whl
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build .

clean:
	rm -rf build model_store/*.mar .pytest_cache .mypy_cache .ruff_cache
