"""The language head: what the model expects at the next position.

Training asks for the losses of labels and never holds all logits; sampling asks for the logits of a few positions.
Shapes: Y labels, V vocabulary, h width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicom_dist.parallel.cross_entropy import VocabShard, cross_entropy_and_z


class LanguageHead(nn.Module):
    """A linear map to the vocabulary. `shard` is set where the ranks of an axis hold V/t rows of the weight each.

    `z_loss`: weight of log^2 Z in the gradient of the cross-entropy (see `linear_cross_entropy`).
    """

    weight: Tensor  # [V, h], or this rank's rows

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.shard: VocabShard | None = None
        self.z_loss = 0.0
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, hidden: Tensor, label_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """-log p(label) in nats, [Y] float32, of hidden [Y, h]; with `z_loss` also log^2 Z, [Y].

        Collective over the shard's axis.
        """
        losses, squares = cross_entropy_and_z(hidden, self.weight, label_ids, self.shard, self.z_loss)
        return (losses, squares) if self.z_loss else losses

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden [..., h], in its dtype. Collective over the shard's axis, and then without gradients."""
        here = F.linear(hidden, self.weight)
        if self.shard is None:
            return here
        return torch.cat(list(self.shard.axis.gather(here.detach())), -1)[..., : self.shard.total]
