# Everything runs in an environment of its own that the first target makes; only python3 with venv must be there.
PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_DIST ?= .venv-dist
PYTEST_FLAGS ?= -n 2
# the models of the tests are so small that a second thread costs more than it brings
PYTEST_ENV = OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help env demo test test-oldest test-comfyui comfyui-figures comfyui-path app-figures style bench figures docs dist clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(VENV)/.installed  ## make .venv with the package and everything that its tests need

demo: $(VENV)/.core  ## write out/*.png, drawn by the small model that ships
	@$(VENV)/bin/python examples/demo.py

test: env  ## lint, then run the test suite
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTEST_ENV) $(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

test-oldest: $(VENV_OLDEST)/.installed  ## run the test suite on the lowest versions that setup.cfg allows
	$(PYTEST_ENV) $(VENV_OLDEST)/bin/python -m pytest $(PYTEST_FLAGS)

test-comfyui: comfyui-path env  ## run the nodes in a real ComfyUI: make test-comfyui COMFYUI=path (COMFYUI_PYTHON: its Python)
	$(PYTEST_ENV) COMFYUI=$(abspath $(COMFYUI)) $(VENV)/bin/python -m pytest -m slow tests/comfyui

comfyui-figures: comfyui-path env  ## write ComfyUI's example workflows and the screenshot of docs/comfyui.md again, with COMFYUI=path
	$(PYTEST_ENV) PYTHONPATH=tests $(VENV)/bin/python docs/comfyui.py $(abspath $(COMFYUI))

app-figures: env  ## make the screenshots of docs/app.md, and the example that the app begins with, again
	$(PYTEST_ENV) PYTHONPATH=tests $(VENV)/bin/python docs/app.py

comfyui-path:
	@test -n "$(COMFYUI)" || { echo "Say where ComfyUI is: COMFYUI=path"; exit 2; }

style: env  ## fix what ruff can fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: env  ## run the benchmarks
	@set -e; for benchmark in benchmarks/*.py; do echo "== $$benchmark"; $(VENV)/bin/python $$benchmark; done

figures: env  ## run what the documents quote of the small model, and write it into them
	$(VENV)/bin/python docs/figures.py

docs: $(VENV)/.docs  ## build the documentation into site/; warnings and broken links are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

dist:  ## build what a release uploads to PyPI, into dist/
	rm -rf dist
	$(PYTHON) -m venv $(VENV_DIST)
	$(VENV_DIST)/bin/python -m pip install --quiet --disable-pip-version-check build twine
	$(VENV_DIST)/bin/python -m build
	$(VENV_DIST)/bin/python -m twine check --strict dist/*

clean:  ## remove the environments and everything generated
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_DIST) out site build dist src/*.egg-info .pytest_cache .ruff_cache

# Two steps: the package alone, which is all that the demo needs, then what the tests need, into the same environment. The
# stamp of each comes last: an interrupted installation has none and is taken up again.
$(VENV)/.core: constraints.txt
$(VENV_OLDEST)/.core: constraints-oldest.txt
$(VENV)/.core $(VENV_OLDEST)/.core: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	@echo "Installing the package into $(@D) with the versions of $(filter constraints%,$^) (once; some minutes) ..."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check \
		--constraint $(filter constraints%,$^) --editable .
	@touch $@

$(VENV)/.installed: $(VENV)/.core constraints.txt
$(VENV_OLDEST)/.installed: $(VENV_OLDEST)/.core constraints-oldest.txt
$(VENV)/.installed $(VENV_OLDEST)/.installed:
	@echo "Installing what the tests need into $(@D) (once; some minutes) ..."
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check \
		--constraint $(filter constraints%,$^) --editable '.[dev]'
	@# without what it names: torchvision needs another build of torch, and only two of its annotators need that
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --no-deps controlnet_aux==0.0.10
	@touch $@

$(VENV)/.docs: $(VENV)/.core constraints.txt
	@echo "Installing what the documentation needs into $(@D) ..."
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@
