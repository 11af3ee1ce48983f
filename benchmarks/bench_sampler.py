"""Drawing after a prefix: one look of the prior (a velocity of N latents after P tokens), 6 layers of 512, float32.

recomputed: the training's forward over prefix and image, once per look. re-scatter: the prefix's keys and values are
cached, but prefix and image are put into new tensors in every layer at every look, as BAGEL's inference does (written
here after its description; no code of it). cached: `velocity_from_prefix`, which writes the image behind the prefix.
Branches of the guidance (condition, without text, without images) one call after the other, or all in one call.
One thread; CPU time of the process.

    python benchmarks/bench_sampler.py [--rounds 5]
"""

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import Goal, interleaved, publish
from torch import Tensor

from unicom_dist.config.schema import PriorConfig
from unicom_dist.data.samples import Arrays, Content, Picture, Text, collate, grid_positions, lay_out
from unicom_dist.models.cache import Prefix
from unicom_dist.models.layers import attend
from unicom_dist.models.transfusion import Transfusion

CHANNELS, FEATURES, VOCABULARY = 64, 1152, 4096
MODEL = PriorConfig(hidden=512, layers=6, heads=8, kv_heads=2, ffn=1408)
CASES = [(64, (16, 16)), (256, (16, 16)), (1024, (16, 16)), (1024, (24, 24))]


def operations(tokens: int, queries: int, positions: int) -> float:
    """Multiplications of a layer for `tokens` positions that go through it, of which the last `queries` are an image.

    positions: keys that the image sees. What goes before it (tokens - queries) sees the half before itself.
    """
    before, kv = tokens - queries, MODEL.kv_heads * MODEL.hidden // MODEL.heads
    weights = 2 * MODEL.hidden * MODEL.hidden + 2 * MODEL.hidden * kv + 3 * MODEL.hidden * MODEL.ffn
    return tokens * weights + 2 * MODEL.hidden * (before * before / 2 + queries * positions)


def content(tokens: int, grid: tuple[int, int], drawn: bool) -> Content:
    """So many tokens, and an image that is drawn after them."""
    text = Text(tuple(range(tokens)))
    if not drawn:
        return Content("", lay_out("text_to_image", [text]))
    z = torch.randn(grid[0] * grid[1], CHANNELS)
    return Content(
        "", lay_out("text_to_image", [text, Picture(grid, ("draw",))]), [Arrays(z, torch.randn_like(z), 0.5)]
    )


class Rescattered:
    """New positions after a cached prefix, merged into new tensors by index in every layer."""

    def __init__(self, prefix: Prefix, new: int) -> None:
        self.prefix, self.old = prefix, torch.arange(prefix.length)
        self.new = torch.arange(prefix.length, prefix.length + new)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [n, H, K], key and value [n, G, K] -> [n, H, K]."""
        keys, values = self._merged(self.prefix.keys[layer], key), self._merged(self.prefix.values[layer], value)
        return attend(query.transpose(0, 1)[None], keys, values)[0].transpose(0, 1)

    def _merged(self, cached: Tensor, new: Tensor) -> Tensor:
        merged = new.new_zeros(len(self.old) + len(self.new), *new.shape[1:])
        merged[self.old] = cached[0, :, : len(self.old)].transpose(0, 1)
        merged[self.new] = new
        return merged.transpose(0, 1)[None]


def looks(model: Transfusion, tokens: int, grid: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Three ways to one velocity."""
    whole = collate([content(tokens, grid, drawn=True)], CHANNELS, FEATURES)
    prefix = model.encode_prefix(collate([content(tokens, grid, drawn=False)], CHANNELS, FEATURES))
    z_t, t, places = (0.5 * whole.latents + 0.5 * whole.noise)[None], torch.tensor([0.5]), grid_positions(*grid)
    new = len(places)
    positions = prefix.next_position.expand(new)

    @torch.no_grad()
    def recomputed() -> Tensor:
        velocity: Tensor = model(whole)[1]
        return velocity

    @torch.no_grad()
    def rescattered() -> Tensor:
        x = model.embed_latents(z_t[0], t.expand(new), places)
        velocity: Tensor = model.flow_head(model.backbone.model(x, positions, Rescattered(prefix, new)))
        return velocity

    def cached() -> Tensor:
        return model.velocity_from_prefix(prefix, z_t, t, places)[0]

    for other in (rescattered, cached):
        torch.testing.assert_close(other(), recomputed(), atol=1e-4, rtol=1e-4)
    return {"recomputed": recomputed, "re-scatter": rescattered, "cached (ours)": cached}


def branches(model: Transfusion, tokens: list[int], grid: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Three branches of one picture, of different lengths."""
    parts = [content(count, grid, drawn=False) for count in tokens]
    together = model.encode_prefix(collate(parts, CHANNELS, FEATURES))
    alone = [model.encode_prefix(collate([part], CHANNELS, FEATURES)) for part in parts]
    places = grid_positions(*grid)
    z, t = torch.randn(1, len(places), CHANNELS), torch.full((len(parts),), 0.5)

    def sequential() -> Tensor:
        return torch.cat([model.velocity_from_prefix(prefix, z, t[:1], places) for prefix in alone])

    def batched() -> Tensor:
        return model.velocity_from_prefix(together, z.expand(len(parts), -1, -1), t, places)

    torch.testing.assert_close(sequential(), batched(), atol=1e-4, rtol=1e-4)
    return {"sequential": sequential, "batched (ours)": batched}


def main() -> int:
    """Measure, print, write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Transfusion(MODEL, VOCABULARY, CHANNELS, FEATURES).eval().requires_grad_(False)
    torch.nn.init.normal_(model.flow_head.out.weight, std=0.05)
    rows, goals, figures = [], [], {}
    for tokens, grid in CASES:
        new = grid[0] * grid[1]
        name, ideal = f"P {tokens}, N {new}", (tokens + new) / new
        fewer = operations(tokens + new, new, tokens + new) / operations(new, new, tokens + new)
        timings = interleaved(looks(model, tokens, grid), options.rounds)
        slowest = timings["recomputed"].median
        for method, timing in timings.items():
            gain = slowest / timing.median
            rows.append([name, method, f"{timing.median * 1e3:.1f}", f"{gain:.2f}", f"{ideal:.2f}", f"{fewer:.2f}"])
            rows[-1].append(timing.spread)
            figures[f"{name}: {method}"] = {"seconds": timing, "speed-up": gain}
        ours = timings["cached (ours)"].median
        goals.append(Goal(f"{name}: speed-up over the token ratio", slowest / ours / ideal, 0.95))
        goals.append(Goal(f"{name}: speed-up over the ratio of operations", slowest / ours / fewer, 0.95))
        goals.append(Goal(f"{name}: time over re-scatter", ours / timings["re-scatter"].median, 1.0, at_least=False))
    for lengths, grid in (([64, 12, 64], (8, 8)), ([320, 268, 64], (16, 16))):
        name = f"3 branches, P {max(lengths)}, N {grid[0] * grid[1]}"
        timings = interleaved(branches(model, lengths, grid), options.rounds)
        sequential, batched = timings["sequential"].median, timings["batched (ours)"].median
        for method, timing in timings.items():
            rows.append(
                [name, method, f"{timing.median * 1e3:.1f}", f"{sequential / timing.median:.2f}", "", "", timing.spread]
            )
            figures[f"{name}: {method}"] = {"seconds": timing, "speed-up": sequential / timing.median}
        goals.append(Goal(f"{name}: batched over sequential", batched / sequential, 1.05, at_least=False))
    print("\nOne velocity; speed-up against the first method of each case\n")
    columns = ["case", "method", "CPU ms", "speed-up", "token ratio", "operations", "spread"]
    return 0 if publish("bench_sampler", columns, rows, goals, figures) else 1


if __name__ == "__main__":
    raise SystemExit(main())
