# Every target works from a fresh clone: the environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICKSTART ?= quickstart
export TOKENIZERS_PARALLELISM = false

.PHONY: help quickstart test test-all test-exhaustive fuzz model-check resolve lint docs bench gpu experiments clean
help:            ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# One process drives a GPU; without one two ranks share the clients, a core each, which no busy neighbour can bring to a halt
# as it does threads that wait for each other. The result is the same.
ifeq ($(shell command -v nvidia-smi),)
quickstart: export OMP_NUM_THREADS = 1
quickstart: export DS_ACCELERATOR = cpu
FREE_PORT = $(shell $(PYTHON) -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])")
TRAIN = deepspeed --quiet --num_accelerators 2 --master_port $(FREE_PORT) launch/train.py
else
TRAIN := feddra-ds train
endif

quickstart: $(VENV)/.installed   ## make data, train FedDRA over five sites, evaluate, write the report
	$(BIN)/feddra-ds data synth --out $(QUICKSTART)/data --num-pairs 2400 --image-size 64 --seed 0 --overwrite
	$(BIN)/$(TRAIN) --config configs/quickstart.yaml --data.root $(QUICKSTART)/data --run.output_dir $(QUICKSTART)/run
	$(BIN)/feddra-ds evaluate $(QUICKSTART)/run
	$(BIN)/feddra-ds report $(QUICKSTART)/run

SOURCES := pyproject.toml $(shell find feddra_ds tests configs launch benchmarks -name '*.py' -o -name '*.yaml')
# Each worker keeps a pool of four ranks (3 GB), which wait more than they compute.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations=20
FAST := $(PYTEST) -m "not slow and not exhaustive and not gpu"

test test-all test-exhaustive: export OMP_NUM_THREADS ?= 1   # many ranks share the cores
test: $(VENV)/.installed         ## unit, distributed and short integration tests (≤ 15 minutes on 2 cores)
	$(FAST)
	@touch $(VENV)/.tested

$(VENV)/.tested: $(VENV)/.installed $(SOURCES)
	$(FAST)
	@touch $@

test-all: $(VENV)/.tested        ## the slow tests too, but those that need a GPU (the fast ones only if a file has changed since they passed)
	$(PYTEST) -m "slow and not exhaustive and not gpu"

test-exhaustive: $(VENV)/.installed  ## the whole of what test-all has a part of: every config, layout, stage and precision (an hour and more)
	$(PYTEST) -m "exhaustive and not gpu"

fuzz: $(VENV)/.installed         ## 2,000 mutated files of every format that others may have written (minutes)
	FEDDRA_FUZZ_CASES=2000 $(BIN)/pytest -q -n 0 tests/unit/test_hostile_input.py

model-check: $(VENV)/.installed  ## 100,000 random schedules of late, lost and repeated messages, stops, kills and restarts (minutes)
	FEDDRA_MODEL_SCHEDULES=100000 $(BIN)/pytest -q -n 0 --timeout 3600 tests/unit/federation/test_protocol_model.py

# Reads metadata only. Local wheels are left out: what they make possible here may not resolve on a user's machine.
resolve: $(VENV)/.installed      ## check that the packages resolve on the plain index, on every declared Python
	@for python in $(shell sed -n 's/.*Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml); do \
	  env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(BIN)/uv pip compile -q --no-config --python-version $$python -c constraints.txt \
	    --extra dev --extra docs --extra gpu pyproject.toml -o /dev/null && echo "Python $$python: resolves" || exit 1; done

lint: $(VENV)/.installed         ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs              ## the documentation as a site, in build/site; a warning is an error
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed        ## the benchmarks, as benchmarks/README.md says
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

gpu: $(VENV)/.installed          ## all that needs a GPU, in at most 10 minutes (DRY=1: the same script, tiny, on a CPU)
	$(BIN)/python benchmarks/on_gpu.py $(if $(DRY),--dry)

# Hours. Test seeds are looked at once: this repeats what docs/experiments.md reports, it is not for choosing. Radiographs need a table:
# feddra-ds experiment run radiographs --csv FILE --seeds test
experiments: $(VENV)/.installed  ## the experiments on synthetic sites, as docs/experiments.md says
	@for name in heterogeneity ablation; do $(BIN)/feddra-ds experiment run $$name --seeds test || exit 1; done
	@for name in heterogeneity ablation; do $(BIN)/feddra-ds experiment table $$name; done

clean:           ## remove the environment and the quickstart's files
	rm -rf $(VENV) $(QUICKSTART)
