"""The language loss: cross-entropy of the next token."""

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, label_ids: Tensor) -> Tensor:
    """-log p(label) in nats, [Y] float32; logits [Y, V] of any dtype, softmax in float32."""
    return F.cross_entropy(logits.float(), label_ids, reduction="none")
