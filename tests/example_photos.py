"""What the photos of ``example_workflows/input`` show: a person and a context each."""

from miniature.examples import photos

SHOWN = {f"{name}.png": shown for name, shown in photos().items()}
CONTEXTS = {name: context for name, (_, context) in SHOWN.items()}
