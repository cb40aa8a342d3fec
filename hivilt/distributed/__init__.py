"""Feature banks whose rows are spread over the ranks of a process group."""

from .bank_retrieval import ShardedFeatureBank
from .exchange import ShardError
from .state import reshard

__all__ = ["ShardError", "ShardedFeatureBank", "reshard"]
