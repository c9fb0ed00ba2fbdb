"""What all tiers share: the repository importable by its top-level names, without shadowing the host's own modules."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# At the end, never at the front: `nodes` must stay the host's module where a test runs the host in process.
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
