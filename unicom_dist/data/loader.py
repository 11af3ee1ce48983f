"""The loaders the trainer uses: exact resume, one global order for any number of ranks, no worker processes."""

from unicom_dist.data.codec_loader import CodecLoader, fixed_codec_batches, heldout_codec_batches
from unicom_dist.data.pairs import build_vocabulary
from unicom_dist.data.prior_loader import (
    PriorLoader,
    heldout_conversation_batches,
    heldout_prior_batches,
    heldout_sets,
)

__all__ = [
    "CodecLoader",
    "PriorLoader",
    "build_vocabulary",
    "fixed_codec_batches",
    "heldout_codec_batches",
    "heldout_conversation_batches",
    "heldout_prior_batches",
    "heldout_sets",
]
