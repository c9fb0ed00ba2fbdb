"""The fast fine-tune of one person on their photos."""

from .advice import report
from .config import FinetuneConfig
from .economy import MemoryPlan
from .learned import Learned
from .loop import (
    FinetuneDiverged,
    FinetuneProgress,
    FinetuneResult,
    automatic_steps,
    finetune,
    require_inputs,
)
from .picture import sample

__all__ = [
    "FinetuneConfig",
    "FinetuneDiverged",
    "FinetuneProgress",
    "FinetuneResult",
    "Learned",
    "MemoryPlan",
    "automatic_steps",
    "finetune",
    "report",
    "require_inputs",
    "sample",
]
