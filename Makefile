# Every target sets up what it needs in .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
DEMO := build/demo.moevlm

.PHONY: setup demo test seeds simulate lint type bench gpu-check train clean

setup: .venv/installed

.venv/installed: pyproject.toml $(wildcard plugins/cpu/*.h plugins/cpu/*/* plugins/tensorrt/*)
	@echo "installing into .venv (some minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --upgrade pip setuptools wheel
	PYTHONWARNINGS=ignore $(BIN)/pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: setup
	@mkdir -p build
	$(BIN)/moevlm build demo/checkpoint -o $(DEMO) --force --target reference --target ort-cpu --target cpu:int8
	$(BIN)/moevlm parity $(DEMO) --checkpoint demo/checkpoint
	$(BIN)/python -m demo.ask $(DEMO)
	$(BIN)/moevlm bench latency $(DEMO) --target reference --target ort-cpu --target cpu:int8 --image-size 96

test: setup
	$(BIN)/pytest -n auto --dist loadfile

# Parity of right engines over 20 random models of each kind, on every instruction set that this machine has.
seeds: setup
	$(BIN)/python -m tests.parity_seeds
	MOEVLM_CPU_ISA=avx2 $(BIN)/python -m tests.parity_seeds

# The demo's TensorRT engine without a GPU: its kernels in Triton's interpreter, held to the engine of the CPU.
simulate: setup
	$(BIN)/python -m tests.simulate

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy finds a namespace package only by its folder, so the three packages are linked into one.
type: setup
	@mkdir -p build/types/moevlm
	@for package in export plugins runtime; do ln -sfn ../../../$$package build/types/moevlm/$$package; done
	MYPYPATH=build/types $(BIN)/mypy --namespace-packages --explicit-package-bases -p moevlm

bench: setup
	$(BIN)/python -m bench.trace_bench --json bench/results/trace.json
	$(BIN)/python -m bench.cpu_bench --json bench/results/cpu.json
	$(BIN)/python -m bench.serve_bench build/bench/1B.group32.moevlm --target cpu:int4 --json bench/results/serve.json

# Not in .venv: $(PYTHON) has torch, triton and numpy for this machine's GPU. There may be no network.
gpu-check:
	@mkdir -p build/check/moevlm
	@for package in export plugins runtime; do ln -sfn ../../../$$package build/check/moevlm/$$package; done
	PYTHONPATH=build/check:. $(PYTHON) -m bench.gpu_check $(ARGS)

train: setup
	$(BIN)/python -m demo.train

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
