"""Work that is spread over the ranks of a process group: feature banks, and contrastive losses of a shared batch."""

from .bank_retrieval import ShardedFeatureBank
from .exchange import ShardError
from .state import reshard

__all__ = ["ShardError", "ShardedFeatureBank", "reshard"]
