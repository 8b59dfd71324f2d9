# make demo   sets everything up, simulates data with known delays and runs the whole pipeline on it
# make test   sets everything up and runs the tests
PYTHON ?= python3
VENV = .venv

.PHONY: demo test clean
demo: $(VENV)/installed
	$(VENV)/bin/python run.py

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -q tests

# Installed anew when the requirements change; the marker is written last, so a broken install is repeated.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -r requirements.txt
	$(VENV)/bin/pip install -q --no-deps scgpt==0.2.4   # reference of the parity test; its own requirements do not load
	touch $@

clean:
	rm -rf $(VENV) effendi_output
