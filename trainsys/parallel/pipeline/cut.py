"""What of a model one stage keeps."""

from __future__ import annotations

from torch import Tensor, nn

from trainsys.models.decoder import Decoder
from trainsys.models.layers import TiedHead
from trainsys.schedules.partition import StagePart


class HeldEmbedding(nn.Module):
    """The embedding's weight on a stage that needs it for its tied head only: hidden states pass through.

    It has the same canonical name as the weight it is a copy of, and so the same initial values.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def keep_part(model: Decoder, part: StagePart) -> None:
    """Drop what ``part`` does not hold of a model that has its layers only. Before tensor parallelism."""
    if not part.head:
        model.norm = model.head = None
    if not part.embed and not isinstance(model.head, TiedHead):
        model.embed = None


def pass_hidden(model: Decoder, part: StagePart) -> None:
    """A stage that holds the embedding for its head alone embeds nothing. After tensor parallelism, whose hooks
    are for tokens."""
    if not part.embed and model.embed is not None:
        model.embed = HeldEmbedding(model.embed.weight)  # type: ignore[arg-type]  # Embedding or SplitEmbedding
