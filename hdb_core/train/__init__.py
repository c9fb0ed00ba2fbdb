"""Training of the hypernetwork: ``python -m hdb_core.train``; ``docs/trainer.md`` walks through it."""
