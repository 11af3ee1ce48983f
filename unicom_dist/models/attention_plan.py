"""Which calls of an attention kernel a packed row needs: the planner behind `attention.AttentionPlan`.

All queries of an image, or of a stretch of text, see the same keys: what is clean in their document before them, and
their own. So a document is *cut* into pieces, rectangles of queries and keys without a hidden pair but for the triangle
at the end of a piece of text; keys that nobody sees later (noised latents) are left out. A call has a price of its own:
documents too short for that are attended *whole*, under a mask: in batches of similar length, or all in one square if
the whole row is that short. Whichever costs less is taken. Costs are in pairs of a query and a key, by whose number a
call takes its time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

from unicom_dist.models.segments import Segment

Range = tuple[int, int]  # [begin, end)

CALL = 2000.0  # pairs that take as long, forward and backward, as a call does by itself (4 heads of 64 channels)
BATCH = 3 * CALL  # the same of a call that reads and writes its samples as copies
MASKED = 1.05  # cost of a pair in a call with a mask
# torch's CPU kernel takes 32 queries at a time, from 192 on 64, from 768 on 256: cost of a pair, measured
COSTS = ((192, 1.3), (768, 1.05), (1 << 62, 1.0))
KEYS_AT_ONCE = 512  # of the same kernel: a causal call skips what is hidden by so many keys
SMALLEST = 64  # queries of a piece of text that was cut
SHORTEST_IN_BATCH = 0.75  # of the longest document: bounds the padding, keeps the batches few


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries [begin, end) of one document, and the ranges of keys that they see, in order.

    causal: the last keys are the queries' own positions, of which each sees none after itself.
    """

    begin: int
    end: int
    keys: tuple[Range, ...]
    causal: bool

    @property
    def seen(self) -> int:
        """Keys, the triangle's included."""
        return sum(end - begin for begin, end in self.keys)

    @property
    def before(self) -> int:
        """Keys that precede the queries' own, in causal pieces."""
        return self.seen - (self.end - self.begin)


@dataclass(frozen=True, slots=True)
class Document:
    """One sample of the row, or neighbours that are attended as one: where it begins, and its segments."""

    begin: int
    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        """Positions."""
        return sum(segment.length for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Calls:
    """What has to be computed for a row: pieces, and batches of whole documents, the longest of each first."""

    pieces: list[Piece]
    batches: list[list[Document]]


def plan_calls(segments: Sequence[Segment]) -> Calls:
    """The cheapest calls that compute the attention of a row, each of its positions in one of them."""
    pieces: list[Piece] = []
    whole: list[Document] = []
    for document in documents(segments):
        cut = pieces_of(document)
        if sum(map(_cost, cut)) < _cost_whole(document.length):
            pieces += cut
        else:
            whole.append(document)
    batches = batches_of(whole)
    if batches and not pieces:
        row = Document(0, tuple(segment for segment in segments if segment.length))
        if _cost_batch([row]) < sum(map(_cost_batch, batches)):
            batches = [[row]]
    return Calls(pieces, batches)


def documents(segments: Sequence[Segment]) -> list[Document]:
    """The samples of a row, in order."""
    found, begin = [], 0
    for _, group in groupby(segments, key=lambda segment: segment.sample):
        found.append(Document(begin, tuple(segment for segment in group if segment.length)))
        begin += found[-1].length
    return [document for document in found if document.segments]


def pieces_of(document: Document) -> list[Piece]:
    """A document cut at its segments, and long text further."""
    pieces: list[Piece] = []
    clean: tuple[Range, ...] = ()  # what later segments see
    begin = document.begin
    for segment in document.segments:
        end = begin + segment.length
        causal = segment.mode == "causal"
        count = _pieces_of_text(sum(b - a for a, b in clean), segment.length) if causal else 1
        edges = [begin + segment.length * number // count for number in range(count + 1)]
        for first, last in pairwise(edges):
            pieces.append(Piece(first, last, _joined(clean, (begin, last)), causal))
        if segment.mode != "noise":
            clean = _joined(clean, (begin, end))
        begin = end
    return pieces


def batches_of(whole: Sequence[Document]) -> list[list[Document]]:
    """Documents of similar length together."""
    batches: list[list[Document]] = []
    for document in sorted(whole, key=lambda document: -document.length):
        if not batches or document.length < SHORTEST_IN_BATCH * batches[-1][0].length:
            batches.append([])
        batches[-1].append(document)
    return batches


def _joined(ranges: tuple[Range, ...], new: Range) -> tuple[Range, ...]:
    if ranges and ranges[-1][1] == new[0]:
        return (*ranges[:-1], (ranges[-1][0], new[1]))
    return (*ranges, new)


def _pair(queries: int) -> float:
    return next(cost for below, cost in COSTS if queries < below)


def _cost(piece: Piece) -> float:
    queries = piece.end - piece.begin
    if piece.causal:
        return _cost_of_text(piece.before, queries, 1)
    return CALL + _pair(queries) * queries * piece.seen


def _cost_square(length: int) -> float:
    return MASKED * _pair(length) * length * length


def _cost_whole(length: int) -> float:
    padding = 2 / (1 + SHORTEST_IN_BATCH)
    return padding * _cost_square(length)


def _cost_batch(batch: Sequence[Document]) -> float:
    return (CALL if len(batch) == 1 else BATCH) + len(batch) * _cost_square(batch[0].length)


@lru_cache(maxsize=1 << 16)
def _pieces_of_text(before: int, length: int) -> int:
    """Into how many equal pieces a text is cut that sees `before` keys before itself."""
    counts = range(1, max(1, length // SMALLEST) + 1)
    return min(counts, key=lambda count: _cost_of_text(before, length, count))


def _cost_of_text(before: int, length: int, count: int) -> float:
    """Of a text in equal pieces: rectangles up to the end of each."""
    size = length / count
    alone = count == 1 and not before  # the kernel knows that it is causal and needs no mask
    triangle = min(size, KEYS_AT_ONCE) if alone else size
    pairs = length * (before + (length + triangle) / 2)
    return count * CALL + (1.0 if alone else MASKED) * _pair(int(size)) * pairs
