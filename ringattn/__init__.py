"""ringattn: exact attention sharded over the sequence, for any mask, with every method as data."""

from ringattn import layouts, masks
from ringattn.context import ContextParallel
from ringattn.errors import CommunicationError, PlanError, UserError
from ringattn.layout import Layout
from ringattn.masks import Mask
from ringattn.operators import attention, route
from ringattn.plan import Plan
from ringattn.recall import Recall
from ringattn.reference import reference
from ringattn.simulate import Simulated, simulate
from ringattn.verify import verify

__version__ = "0.1.0"
__all__ = [
    "CommunicationError",
    "ContextParallel",
    "Layout",
    "Mask",
    "Plan",
    "PlanError",
    "Recall",
    "Simulated",
    "UserError",
    "attention",
    "layouts",
    "masks",
    "reference",
    "route",
    "simulate",
    "verify",
]
