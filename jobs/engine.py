"""DeepSpeed engines, started alike for everything that is trained."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from pilotfish.train.config import TrainConfig
from pilotfish.train.deepspeed_config import Launch, read, resolve


def import_deepspeed(*, on_cpu: bool) -> Any:
    """Import DeepSpeed: in workers alone, since the driver has no use for it."""
    import deepspeed

    # Its scheduler warns about its own construction.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if on_cpu:
        # The shared-memory collective is compiled on first use; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def partitioned_loading(
    init: str | dict[str, Any], train: TrainConfig, *, on_cpu: bool
) -> Iterator[None]:
    """Let weights that are loaded in here be partitioned at once, where ZeRO-3 will train them.

    Else each worker would hold all of them first. Untrained weights are drawn whole: they are the
    same then, however they are trained. A collective.
    """
    zero: dict[str, Any] = read(train.deepspeed).get("zero_optimization", {})
    if zero.get("stage") != 3 or not isinstance(init, str):
        yield
        return
    import_deepspeed(on_cpu=on_cpu)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    launch = Launch(total_steps=1, num_workers=dist.get_world_size(), on_cpu=on_cpu)
    tree = resolve(train.model_copy(update={"micro_batch_size": None}), launch)
    # Of batches, DeepSpeed wants one number here, and checks the others before it knows the world.
    for name in ("train_batch_size", "gradient_accumulation_steps"):
        del tree[name]
    partitioning = HfDeepSpeedConfig(tree)
    try:
        yield
    finally:
        del partitioning  # transformers looks whether it lives


def start_engine(
    module: nn.Module,
    train: TrainConfig,
    *,
    total_steps: int,
    on_cpu: bool,
    num_alike: int = 1,
) -> Any:
    """Return an engine over the whole worker group that trains what of `module` has gradients.

    So many workers each see the same rows (`num_alike`); DeepSpeed counts a row as often.
    """
    deepspeed = import_deepspeed(on_cpu=on_cpu)
    launch = Launch(total_steps=total_steps, num_workers=dist.get_world_size(), on_cpu=on_cpu)
    trained: Any = [weight for weight in module.parameters() if weight.requires_grad]
    counted = train.model_copy(update={"batch_size": train.batch_size * num_alike})
    config = resolve(counted, launch)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=config)
    return engine
