.PHONY: check format test test-slow requirements demo

check:  ## what every change must pass: format, lint, types, fast tests
	./launch/setup.sh dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	./launch/test.sh -m "not ci"

format:
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

test:
	./launch/test.sh

test-slow:
	./launch/test.sh --slow

requirements:  ## the lock as pins that plain pip accepts
	.venv/bin/uv export --quiet --frozen --no-hashes --no-emit-project --no-header --no-annotate \
		--extra train --group dev --output-file requirements.txt

demo:
	./launch/demo.sh
