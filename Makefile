# Every target sets up what it needs; `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
DEMO := build/demo-2bit
CLIENTS := build/compat/.installed

.DEFAULT_GOAL := help
.PHONY: help demo smoke test calm alone rxe check bench quality fuzz soak compat cross format clean
FUZZ_S ?= 60
FUZZED := tests/native/fuzz_frame.c $(addprefix native/,crc32c.c frame.c transport.c tcp.c self_test.c)
FUZZ_FLAGS := -std=c11 -g -O1 -Inative

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(READY): pyproject.toml setup.py $(wildcard native/*.[ch] native/kernels/*.[ch] native/*.cpp native/build*.py)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	touch $@

# What only some targets need, of the groups in pyproject.toml.
.venv/.%: $(READY)
	$(BIN)/python -m pip install --quiet --group $*
	touch $@

$(DEMO): $(READY) $(wildcard expertd/demo/*) $(wildcard quant/*.py)
	rm -rf $(DEMO)
	mkdir -p build
	$(BIN)/expertd quantize demo $(DEMO) --effort fast # normal takes a minute more
	touch $@

demo: $(DEMO) ## Quantize the embedded model and serve it from two ranks, until Ctrl-C
	@$(BIN)/expertd serve $(DEMO) --ranks 2 || [ $$? -eq 130 ] # 130: Ctrl-C

smoke: $(DEMO) ## The same, with one question over HTTP and the speed of one rank and of two
	$(BIN)/python -m expertd.bench.smoke $(DEMO)

test: $(READY) ## Run the tests: the calm ones on two cores, then those that kill processes or look at a clock, one by one
	$(MAKE) calm
	$(MAKE) alone

calm: $(READY) # worksteal: who is done takes from the other, and files stay together as far as that allows
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 -m "calm and not (soak or compat)"

alone: $(READY)
	$(BIN)/python -m pytest --durations=15 -m "not (calm or soak or compat)"

rxe: $(READY) ## Run the verbs tests with a real kernel's RDMA, in QEMU (tests/rxe/README.md)
	$(BIN)/python -m tests.rxe.boot --memory 2048 --timeout 1200 -- $(BIN)/python -m pytest -p no:cacheprovider -v -m "not slow" tests/rxe/suite --durations=12 \
		tests/test_netns.py::test_delay tests/test_netns.py::test_tcp_mends_what_the_cable_does

check: $(READY) ## Run ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf build/types && mkdir -p build/types/expertd
	ln -s $(wildcard $(CURDIR)/expertd/*) $(addprefix $(CURDIR)/,native quant topology bench) build/types/expertd
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p expertd

bench: $(DEMO) ## Measure: links beside their floors, exchanges beside MLX's ring, kernels beside the roof, decode and prefill beside one rank
	$(BIN)/expertd bench link --json build/bench-link.json
	$(BIN)/python -m expertd.bench.exchange --json build/bench-exchange.json
	$(BIN)/expertd bench kernels --quick --json build/bench-kernels.json
	$(BIN)/expertd bench decode $(DEMO) --ranks 2 --split auto --tokens 32 --json build/bench-decode.json
	$(BIN)/expertd bench prefill $(DEMO) --ranks 2 --split auto --tokens 96 --json build/bench-prefill.json
	$(BIN)/python -m expertd.bench.convert --json build/bench-convert.json

quality: $(READY) ## Measure 2-bit experts beside mlx-lm's, three seeds: about an hour (bench/quality.py --llama-cpp: beside llama.cpp's)
	$(BIN)/python -m expertd.bench.quality --json build/bench-quality.json

fuzz: .venv/.fuzz ## Fuzz the frames, the messages and web servers' answers, for FUZZ_S seconds each (60); libFuzzer where there is clang
	mkdir -p build/fuzz/corpus
	if command -v clang >/dev/null; then \
	  clang $(FUZZ_FLAGS) -fsanitize=fuzzer,address,undefined $(FUZZED) -o build/fuzz/frame -lpthread && \
	  build/fuzz/frame -max_total_time=$(FUZZ_S) -max_len=16384 build/fuzz/corpus; \
	else \
	  cc $(FUZZ_FLAGS) -DRANDOM_INPUTS -fsanitize=address,undefined -fno-sanitize-recover=all $(FUZZED) \
	    -o build/fuzz/frame -lpthread && build/fuzz/frame $(FUZZ_S); \
	fi
	mkdir -p build/fuzz/messages
	$(BIN)/python -m tests.fuzz_wire -max_total_time=$(FUZZ_S) -max_len=4096 build/fuzz/messages
	mkdir -p build/fuzz/answers
	$(BIN)/python -m tests.fuzz_answers -max_total_time=$(FUZZ_S) -max_len=4096 build/fuzz/answers

soak: $(READY) $(CLIENTS) ## The long forms: a server under everything for an hour; ranks killed at 2000 points; a million swaps over TCP and the mailbox; 20 GB converted and killed; the bits over real verbs
	$(BIN)/python -m pytest -m soak
	$(BIN)/python -m tests.cluster.soak --minutes 60
	$(BIN)/python -m tests.cluster.kill_points --points 2000
	$(BIN)/python -m expertd.bench.soak tcp
	$(BIN)/python -m expertd.bench.soak mailbox
	$(BIN)/python -m expertd.bench.convert --soak
	$(BIN)/python -m tests.rxe.boot --memory 2048 --timeout 1800 -- $(BIN)/python -m pytest -p no:cacheprovider -v \
		-m slow tests/rxe/suite

# uv: pip needs twice as long for so many packages. Nothing of ours is in there.
$(CLIENTS): pyproject.toml
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet uv
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --group compat
	touch $@

compat: $(READY) $(CLIENTS) ## Run other people's clients against the demo: LiteLLM, lm-evaluation-harness, AIPerf, schemathesis (installs them)
	$(BIN)/python -m pytest -q -m "compat and not soak" tests/compat/test_schemathesis.py >build/test-hostile.log 2>&1 & hostile=$$!; \
	$(BIN)/python -m pytest -m "compat and not soak" --durations=0 tests/compat/test_clients.py; clients=$$?; \
	wait $$hostile; hostile=$$?; cat build/test-hostile.log; exit $$((hostile | clients))

cross: .venv/.cross ## Compile the C code for a Mac, and run it for ARM in QEMU (downloads a compiler of 100 MB)
	$(BIN)/python -m pytest -rs tests/native/test_compiles_for_macos.py tests/native/test_arm64.py

format: $(READY) ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove everything that was built
	rm -rf .venv build dist *.egg-info native/*.so native/_*.c
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
