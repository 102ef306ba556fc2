"""Fuzzing of everything that reads files from elsewhere: valid files, changed where their structure is, fed to the readers.

`python -P -m tests.fuzz --count 100000` runs it (``PYTHONPATH=src:.``); tests/fuzz/test_fuzz.py runs a little of it, and
tests/fuzz/by_coverage.py lets atheris, where it is installed, guide raw bytes by the lines they reach.
"""
