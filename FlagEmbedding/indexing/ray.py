"""``python -m FlagEmbedding.indexing.ray``: step 0 over the actors of a Ray cluster, on a disk that all of them see.

The plan is made on a machine like those that encode, its shards are a Ray dataset, and an actor holds the encoder. Ray
starts actors as there is work and room, and starts those again that were lost, with their work: a shard may be encoded
twice, and is the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from FlagEmbedding.evaluation.arguments import CollectionArguments
from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.utils.cli import entry_point, option, parse_whole
from FlagEmbedding.utils.errors import UsageError, UserError

if TYPE_CHECKING:
    from FlagEmbedding.indexing.planning import Plan

SHARDS = 8  # at most this many one after the other in a task of an actor


@dataclass(frozen=True)
class RayArguments:
    """Ray."""

    address: str | None = option(None, "of the cluster; default: RAY_ADDRESS, else one is started on this machine")
    min_actors: int = option(1, "that hold an encoder")
    max_actors: int = option(8, "as many are started as there is work and room for")
    gpus_per_actor: float = option(0.0, "1 on a GPU cluster; 0: the encoder runs on CPUs")
    cpus_per_actor: float = option(1.0, "cores reserved for each actor")

    def __post_init__(self) -> None:
        if not 1 <= self.min_actors <= self.max_actors:
            raise UsageError(
                f"--min_actors {self.min_actors} --max_actors {self.max_actors}: give 1 or more, the first at most as "
                "large as the second"
            )
        if self.gpus_per_actor < 0 or self.cpus_per_actor < 0:
            raise UsageError("--gpus_per_actor and --cpus_per_actor: give 0 or more")


@dataclass(frozen=True)
class RayOptions:
    """Step 0 on Ray."""

    encoder: EncoderArguments
    collection: CollectionArguments
    index: IndexArguments
    ray: RayArguments


class ShardEncoder:
    """An actor: an encoder that is loaded where it wakes, and the plan it encodes shards of."""

    def __init__(self, plan: Plan) -> None:
        from FlagEmbedding.indexing.planning import load_encoder

        self.plan, self.encoder = plan, load_encoder(plan.encoder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from FlagEmbedding.indexing.encoding import encode_shards

        store = self.plan.store
        left = (int(shard) for shard in batch["shard"] if not store.path(int(shard), "json").exists())
        for _ in encode_shards(self.plan, left, self.encoder):
            pass
        return batch


def encode_on_ray(options: RayOptions) -> None:
    """An index of every language's corpus. Raises ``UserError``, also for what an actor refuses."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("ray is missing: pip install 'FlagEmbedding[ray]'") from error

    from FlagEmbedding.collections.source import sources
    from FlagEmbedding.indexing.encoding import finish
    from FlagEmbedding.indexing.planning import plan
    from FlagEmbedding.retrieval.index import index_folder

    place, chosen = options.collection, options.ray
    languages = sources(place.languages, place.split, place.data_dir, options.encoder.cache_dir)
    if not ray.is_initialized():
        ray.init(address=chosen.address, log_to_driver=False)
    room: dict[str, Any] = {"num_cpus": chosen.cpus_per_actor, "num_gpus": chosen.gpus_per_actor}
    planner: Any = ray.remote(plan).options(**room)
    try:
        for lang, source in languages.items():
            # Absolute: an actor's working directory is not this one.
            folder = Path(index_folder(place.index_save_dir, options.encoder.encoder, lang)).absolute()
            files = [path.absolute() for path in source.corpus()]
            what = (files, options.encoder, folder, lang, options.index)
            # On CPUs this machine is like the actors'; with GPUs it need not have one.
            made: Plan | None = ray.get(planner.remote(*what)) if chosen.gpus_per_actor else plan(*what)
            if made is not None:
                _encode(made, chosen, room, lang)
                finish(folder)
    except ray.exceptions.RayError as error:
        raise _refusal(error) from error


def _encode(plan: Plan, chosen: RayArguments, room: dict[str, Any], lang: str) -> None:
    import ray
    from tqdm import tqdm

    from FlagEmbedding.utils.progress import progress

    missing = plan.missing()
    if not missing:
        return
    # Neighbors in a task, which read packed files once; and some tasks for every actor.
    size = max(1, min(SHARDS, len(missing) // (4 * chosen.max_actors)))
    shards = ray.data.from_items(
        [{"shard": shard} for shard in missing], override_num_blocks=math.ceil(len(missing) / size)
    )
    actors = ray.data.ActorPoolStrategy(min_size=chosen.min_actors, max_size=chosen.max_actors)
    done = shards.map_batches(ShardEncoder, fn_constructor_args=(plan,), compute=actors, batch_size=None, **room)
    bar: tqdm[Any] = progress(lang, total=len(missing))
    with bar:
        for batch in done.iter_batches(batch_size=None):
            bar.update(len(batch["shard"]))


def _refusal(error: BaseException) -> BaseException:
    """The ``UserError`` that an actor raised, out of what Ray has wrapped around it; else the error itself."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, UserError):
            return type(found)(str(getattr(found, "cause", found)))
        found = getattr(found, "cause", None) or found.__cause__
    return error


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and encode."""
    encode_on_ray(parse_whole(RayOptions, argv, "Embed the passages of MIRACL languages into an index, on Ray."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
