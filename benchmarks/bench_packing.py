"""What packing leaves empty, how evenly rows are dealt to ranks, and what aligned images would cost. Nothing is timed.

The samples are drawn from the length distribution of a general mixture; a log-normal is given by its median and sigma:
20 % documents of text, 600 tokens (1.1), cut to the row; 40 % text to image, a prompt of 100 (0.6) and an image; 20 %
image to text, an image and an answer of 150 (0.7); 10 % edits, an image twice (read and as reference), 60 words (0.6)
and the image drawn; 10 % interleaved, 2 to 8 paragraphs of 80 (0.7), each with an image, half of them drawn and then
kept clean. Images are of about 8 x 8, 16 x 16 or 32 x 32 positions (1 : 2 : 5) in 33 aspect ratios, never over 1,024.
FLOPs are those of UniCom's 7B backbone. Nothing but the seed decides the figures: they are the same on every machine.

    python benchmarks/bench_packing.py [--rows 1024]
"""

import argparse
import math
import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from random import Random

from common import Goal, publish

from unicom_dist.config.schema import PriorConfig
from unicom_dist.data.balance import amounts_of, deal
from unicom_dist.data.packing import Packer
from unicom_dist.data.samples import Layout, Picture, Text, Use, lay_out
from unicom_dist.models.encoders.crop import RATIOS
from unicom_dist.models.flex import BLOCK, _table, visible_pairs
from unicom_dist.models.operations import transfusion_flops
from unicom_dist.models.segments import Segment

MODEL = PriorConfig(hidden=3584, layers=28, heads=28, kv_heads=4, ffn=18944, tie_embeddings=False)
VOCABULARY, LATENT_CHANNELS, FEATURE_CHANNELS = 152064, 64, 1152
ROWS = {"8k": 8192, "32k": 32768}
RANKS, ROWS_PER_RANK = 8, (1, 2, 4, 8)
OPEN = (1, 8, 64)
GOAL_ROWS = 8  # per rank and step, as in recipes/unicom_7b


def grids(side: int) -> list[tuple[int, int]]:
    """Rows and columns of about side x side positions at every ratio, none over 1,024."""
    found = [(round(side / math.sqrt(ratio)), round(side * math.sqrt(ratio))) for ratio in RATIOS]
    return [(rows, columns) for rows, columns in found if rows * columns <= 1024]


SIZES = [grids(side) for side in (8, 16, 32)]


class Samples:
    """An endless stream of layouts; those longer than a row are left out."""

    def __init__(self, row: int, seed: int = 0) -> None:
        self._row, self._random = row, Random(seed)

    def __iter__(self) -> Iterator[Layout]:
        while True:
            layout = self._sample()
            if layout.length <= self._row:
                yield layout

    def _sample(self) -> Layout:
        (kind,) = self._random.choices(range(5), (20, 40, 20, 10, 10))
        begin = self._text(1)
        if kind == 0:
            length = min(self._length(600, 1.1), self._row)
            return lay_out("text", [begin, self._text(length - 1, learned=True)])
        if kind == 1:
            return lay_out("text_to_image", [self._text(self._length(100, 0.6)), self._picture("draw")])
        if kind == 2:
            answer = self._text(self._length(150, 0.7), learned=True)
            return lay_out("image_to_text", [self._picture("read"), self._text(20), answer])
        if kind == 3:
            shown, words = self._picture("read", "reference"), self._text(self._length(60, 0.6))
            return lay_out("image_text_to_image", [shown, words, self._picture("draw")])
        pieces: list[Text | Picture] = []
        for _ in range(self._random.randint(2, 8)):
            uses: tuple[Use, ...] = ("draw", "reference") if self._random.random() < 0.5 else ("read",)
            pieces += [begin, self._text(self._length(80, 0.7), learned=True), self._picture(*uses)]
        return lay_out("interleaved", pieces)

    def _length(self, median: float, sigma: float) -> int:
        return max(int(self._random.lognormvariate(math.log(median), sigma)), 2)

    def _text(self, length: int, learned: bool = False) -> Text:
        return Text((0,) * length, learned)

    def _picture(self, *uses: Use) -> Picture:
        (sizes,) = self._random.choices(SIZES, (1, 2, 5))
        return Picture(self._random.choice(sizes), uses)


def packed(row: int, count: int, max_open: int) -> list[list[Layout]]:
    """The first `count` rows."""
    packer: Packer[Layout] = Packer(row, max_open)
    finished = (packer.add(layout) for layout in Samples(row))
    return list(islice((layouts for layouts in finished if layouts is not None), count))


def useful(rows: list[list[Layout]], row: int) -> float:
    """Share of the slots that hold a sample's position."""
    return sum(layout.length for layouts in rows for layout in layouts) / (row * len(rows))


def flops(layouts: list[Layout]) -> int:
    """Of forward and backward of a row."""
    sizes = {"vocabulary": VOCABULARY, "latent_channels": LATENT_CHANNELS, "feature_channels": FEATURE_CHANNELS}
    return sum(transfusion_flops(MODEL, amounts_of(layout), **sizes) for layout in layouts)


def imbalance(costs: list[int], per_rank: int, dealt: bool) -> tuple[float, float]:
    """Costliest rank over the mean of the ranks: all steps together, and the worst step."""
    step, top, mean, worst = RANKS * per_rank, 0.0, 0.0, 0.0
    for first, end in pairwise(range(0, len(costs) + 1, step)):
        mine = costs[first:end]
        in_order = [[list(range(rank * per_rank, (rank + 1) * per_rank))] for rank in range(RANKS)]
        sums = [sum(mine[n] for piece in rank for n in piece) for rank in (deal(mine, RANKS, 1) if dealt else in_order)]
        top, mean = top + max(sums), mean + sum(sums) / RANKS
        worst = max(worst, max(sums) * RANKS / sum(sums))
    return top / mean, worst


def images_per_rank(rows: list[list[Layout]], costs: list[int], per_rank: int) -> float:
    """Images of the rank with most of them over the mean of the ranks, all steps together."""
    step, top, mean = RANKS * per_rank, 0, 0.0
    for first, end in pairwise(range(0, len(costs) + 1, step)):
        images = [sum(len(layout.images) for layout in layouts) for layouts in rows[first:end]]
        counts = [sum(images[n] for piece in rank for n in piece) for rank in deal(costs[first:end], RANKS, 1)]
        top, mean = top + max(counts), mean + sum(counts) / RANKS
    return top / mean


def aligned(layouts: list[Layout], align: int) -> tuple[list[Segment], int]:
    """Segments of a row with fillers, samples of their own, before every image that does not start at a block."""
    segments: list[Segment] = []
    place = fillers = 0
    for number, layout in enumerate(layouts):
        for mode, length in layout.segments:
            missing = -place % align if mode != "causal" else 0
            if missing:
                segments.append(Segment(len(layouts) + len(segments), "causal", missing))
            segments.append(Segment(number, mode, length))
            place, fillers = place + missing + length, fillers + missing
    return segments, fillers


def blocks(rows: list[list[Layout]], align: int) -> dict[str, float]:
    """Pairs in the blocks that FlexAttention touches over visible pairs; fillers over positions."""
    touched = seen = fillers = positions = 0
    for layouts in rows:
        segments, added = aligned(layouts, align)
        touched += int((visible_pairs(_table(segments), BLOCK) > 0).sum()) * BLOCK**2
        seen += sum(amounts_of(layout).pairs for layout in layouts)
        fillers, positions = fillers + added, positions + sum(layout.length for layout in layouts)
    attention = 12 * MODEL.layers * MODEL.hidden * seen
    rest = sum(map(flops, rows)) - attention
    waste, empty = touched / seen, fillers / positions
    return {"touched_over_visible": waste, "fillers": empty, "work": rest * (1 + empty) + attention * waste}


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1024)
    count = parser.parse_args().rows
    table: list[list[str]] = []
    goals: list[Goal] = []
    figures: dict[str, object] = {"rows": count, "ranks": RANKS}
    for name, row in ROWS.items():
        shares = {max_open: useful(packed(row, count, max_open), row) for max_open in OPEN}
        rows = packed(row, count, 8)
        costs = [flops(layouts) for layouts in rows]
        table += [[name, f"useful slots, {n} open rows", f"{share:.4f}", ""] for n, share in shares.items()]
        dealt = {n: imbalance(costs, n, dealt=True) for n in ROWS_PER_RANK}
        in_order = {n: imbalance(costs, n, dealt=False) for n in ROWS_PER_RANK}
        images = {n: images_per_rank(rows, costs, n) for n in ROWS_PER_RANK}
        for n in ROWS_PER_RANK:
            found = f"{dealt[n][0]:.4f} (worst step {dealt[n][1]:.3f})"
            table.append([name, f"FLOPs of {RANKS} ranks, {n} rows each", found, f"{in_order[n][0]:.4f}"])
            table.append([name, f"images of {RANKS} ranks, {n} rows each", f"{images[n]:.4f}", ""])
        some = rows[:64]
        plain, with_fillers = blocks(some, 1), blocks(some, BLOCK)
        cost = with_fillers["work"] / plain["work"]
        table.append([name, "pairs in touched blocks / visible", f"{plain['touched_over_visible']:.3f}", ""])
        table.append([name, "the same, images aligned", f"{with_fillers['touched_over_visible']:.3f}", ""])
        table.append([name, "fillers that takes / positions", f"{with_fillers['fillers']:.3f}", ""])
        table.append([name, "work with aligned images / without", f"{cost:.3f}", ""])
        goals += [
            Goal(f"{name}: useful slots, 8 open rows", shares[8], 0.985, unit=""),
            Goal(f"{name}: FLOPs, {GOAL_ROWS} rows a rank", dealt[GOAL_ROWS][0], 1.03, at_least=False),
        ]
        figures[name] = {
            "samples_per_row": sum(map(len, rows)) / len(rows),
            "useful_by_open_rows": shares,
            "flops_dealt": {n: {"all_steps": both[0], "worst_step": both[1]} for n, both in dealt.items()},
            "flops_in_order": {n: {"all_steps": both[0], "worst_step": both[1]} for n, both in in_order.items()},
            "images_dealt": images,
            "blocks": {"plain": plain, "aligned": with_fillers, "work_ratio": cost},
        }
    met = publish("bench_packing", ["row", "figure", "ours", "rows in order"], table, goals, figures)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
