"""Property-based runs of schemathesis against the documents of the running services, with valid and invalid requests.
`make fuzz` runs all of them, `make test` a few (tests/integration/test_fuzz.py).

A finding is an error either in the code or in the document. `ground.py` makes the entities that requests can name.
"""
