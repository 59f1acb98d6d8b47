"""Property-based runs of schemathesis against the documents of the running services: what no client should send, and
what any may. `make fuzz` runs all of it, `make test` a little (tests/integration/test_fuzz.py).

What it finds is wrong either in the code or in the document; `ground.py` says what is there to be found by id.
"""
