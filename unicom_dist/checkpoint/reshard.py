"""A checkpoint written anew as the ranks of another layout would write it, so that each of them reads its own file.

Not needed to load it there: any layout reads any checkpoint. It saves every later start from collecting cut rows.
"""

import shutil
import uuid
from pathlib import Path

import torch

from unicom_dist.checkpoint.description import described_prior
from unicom_dist.checkpoint.saved import DOCS, Checkpoint, layout_of, rank_file
from unicom_dist.checkpoint.store import complete, describe, owned
from unicom_dist.checkpoint.tensorfile import TensorWriter
from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.layout import Layout, refusals
from unicom_dist.config.schema import ParallelConfig
from unicom_dist.config.storage import reason
from unicom_dist.models.backbone import Part
from unicom_dist.models.sharding import EMBEDDING, outline
from unicom_dist.parallel.engine import Fragment, Piece, fragments_of, pieces_of
from unicom_dist.parallel.mesh import Axis, Mesh
from unicom_dist.parallel.pipeline.split import by_rank, estimate, split


def reshard(source: Path, out: Path, layout: Layout) -> None:
    """Write the checkpoint `source` to the new folder `out`, with a file per rank of `layout`.

    Memory: one fragment. The random states stay behind: they belong to the ranks of the old layout.
    CheckpointError: incomplete, damaged or foreign source, or `out` cannot be written. ConfigError: impossible layout.
    """
    saved = Checkpoint(source)
    held = parameters(saved, layout)
    save = uuid.uuid4().hex[:8]
    partial = out.with_name(f".{out.name}.{save}")
    try:
        partial.mkdir(parents=True)
        for rank in range(layout.world):
            mine = owned(fragments(held, layout, rank))
            saved.check({f.name: f.piece.shape for f in mine}, lambda name: True)
            wanted = [(kind, f) for kind in saved.all_kinds for f in mine if kind in saved.kinds[f.name]]
            names = [f"{kind}/{f.name}" for kind, f in wanted]
            path, size = partial / rank_file(rank, layout.world), sum(4 * f.numel for _, f in wanted)
            with TensorWriter(path, names, describe(mine, save), size) as writer:
                for kind, f in wanted:
                    values = torch.empty(f.numel)
                    saved.fill([(f, {kind: values}, 0)])
                    writer.add(f"{kind}/{f.name}", values)
        state = {name: value for name, value in saved.state.items() if name not in ("files", "tensors")}
        complete(partial, out, layout.world, {**state, "layout": layout_of(layout)})
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint could not be written to {out}",
            reason(error),
            "free space or name a folder that can be written",
            DOCS,
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fragments(held: dict[tuple[int, int], list[list[Piece]]], layout: Layout, rank: int) -> list[Fragment]:
    """What `rank` writes of the parameters at its (pp, tp); under ZeRO the replicas have an equal share of each."""
    place = layout.coordinates(rank)
    replicas, replica = layout.dp * layout.ulysses, place["dp"] * layout.ulysses + place["ulysses"]
    found = []
    for pieces in held[place["pp"], place["tp"]]:
        numel = sum(piece.numel for piece in pieces)
        share = -(-numel // replicas) if layout.zero_stage else numel
        offset = min(replica * share, numel)
        found += fragments_of(pieces, offset, min(share, numel - offset), 0, 0)
    return found


def parameters(saved: Checkpoint, layout: Layout) -> dict[tuple[int, int], list[list[Piece]]]:
    """By (pp, tp): the pieces of every parameter there. ConfigError: the layout does not suit the model."""
    everywhere = [(pp, tp) for pp in range(layout.pp) for tp in range(layout.tp)]
    content = saved.state.get("model", {})
    if "prior" not in content:
        if layout.tp * layout.pp > 1:
            raise ConfigError(
                f"tp = {layout.tp}, pp = {layout.pp} for {saved.path}",
                "it is no prior's, and only a prior's weights are shared by tp and pp",
                "--layout dp=N",
                DOCS,
            )
        return {(0, 0): [[Piece(name, shape)] for name, shape in saved.shapes.items()]}
    prior, latent_channels, feature_channels = described_prior(content, saved.path)
    sizes = saved.shapes.get(EMBEDDING, (0,))[0], latent_channels, feature_channels
    wanted = ParallelConfig(tp=layout.tp, pp=layout.pp, ulysses=layout.ulysses, zero_stage=layout.zero_stage)
    for refusal in refusals(wanted, prior, layout.world):
        raise ConfigError(refusal.what, refusal.why, refusal.remedy, DOCS)
    layers = by_rank(split(estimate(prior, *sizes), layout.pp), layout.pp)
    held: dict[tuple[int, int], list[list[Piece]]] = {}
    for pp, tp in everywhere:
        mesh = Mesh(0, 1, torch.device("cpu"), layout, tp=Axis("tp", tp, layout.tp))
        module = outline(prior, *sizes, mesh, Part(pp == 0, pp == layout.pp - 1, layers[pp]))
        held[pp, tp] = [pieces_of(name, p, tuple(p.shape)) for name, p in module.named_parameters()]
    # What joint training adds is whole on the first pp_stage; one of its ranks keeps it.
    shared = {piece.name for parameters in held.values() for pieces in parameters for piece in pieces}
    held[0, 0] += [[Piece(name, shape)] for name, shape in saved.shapes.items() if name not in shared]
    return held
