"""Runs schemathesis against running services: it makes valid and invalid requests from their API documents.
`make fuzz` runs all of them, `make test` a few (tests/integration/test_fuzz.py).

A finding is an error in the code or in the document. `known_entities.py` makes the entities that requests can name.
"""
