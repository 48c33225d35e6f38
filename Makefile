.PHONY: audit check format test test-slow requirements demo

check:  ## what every change must pass: format, lint, types, the central tests; two minutes
	./launch/setup.sh dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	./launch/test.sh -m central

format:
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

test:
	./launch/test.sh

test-slow:
	./launch/test.sh --slow

audit:  ## known holes in the pinned packages, and the licences of all that is installed
	.venv/bin/uvx pip-audit --requirement requirements.txt --disable-pip --no-deps --strict
	.venv/bin/fourdstar doctor --licenses

requirements:  ## every package's version, for uv and for pip
	.venv/bin/uv pip compile --quiet --no-header --no-annotate --extra train --extra heic --extra plots --extra remote --extra wandb --group dev \
		--universal --python-version 3.12 --output-file requirements.txt pyproject.toml

demo:
	./launch/demo.sh
