"""The fast fine-tune of one person on their photos."""

from .config import FinetuneConfig
from .loop import (
    FinetuneDiverged,
    FinetuneProgress,
    FinetuneResult,
    automatic_steps,
    finetune,
    require_inputs,
)

__all__ = [
    "FinetuneConfig",
    "FinetuneDiverged",
    "FinetuneProgress",
    "FinetuneResult",
    "automatic_steps",
    "finetune",
    "require_inputs",
]
