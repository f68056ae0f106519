"""The frozen base that guides are trained beside: a copy per worker, or one shared by workers.

Shapes: B rows, T positions, V vocabulary.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from jobs.engine import import_deepspeed
from jobs.lockstep import lockstep
from jobs.memory_plan import count_parameters
from jobs.sharding_rules import FrozenBaseConfig, check_sharding, resolve_dtype
from pilotfish.errors import ConfigError
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_architecture, load_frozen


class FrozenBase:
    """One worker's hold on the base: the whole of it, or a share.

    Its weights never change and never enter an optimizer. A guide beside it has a DeepSpeed engine
    of its own, over all workers: those of a tensor group see the same batch, so the mean over all
    workers is the mean over the data.
    """

    def __init__(self, model: PreTrainedModel, *, tensor_size: int = 1, engine: Any = None) -> None:
        """`engine` is DeepSpeed's, if it partitions the model."""
        self.model = model
        self.data_rank = dist.get_rank() // tensor_size
        """Which share of the data this worker takes; the workers of a tensor group take one."""
        self.data_size = dist.get_world_size() // tensor_size
        """How many shares there are."""
        self._engine = engine

    def causal_lm(
        self,
        *,
        num_slots: int = 32,
        vocab_size: int | None = None,
        max_cache_tokens: int | None = None,
    ) -> CausalLM:
        """Return the base for the decode engine. All workers call it.

        The workers of a tensor group must decode the same requests, with seeds and without drafts:
        a seed that is drawn and a number of drafts that is timed differ between workers.
        """
        return CausalLM(
            self.model,
            num_slots=num_slots,
            vocab_size=vocab_size,
            max_cache_tokens=max_cache_tokens,
        )

    @torch.no_grad()
    def logits(
        self, token_ids_BT: Tensor, attention_mask: Tensor, position_ids_BT: Tensor | None = None
    ) -> Tensor:
        """Return the base's logits [B, T, V], without gradients; with them by calling `model`.

        The workers of a tensor group call it with the same rows; under `zero3` all workers call it
        equally often, with rows of any number and length.
        """
        return self.model(
            input_ids=token_ids_BT,
            attention_mask=attention_mask,
            position_ids=position_ids_BT,
            use_cache=False,
        ).logits

    def parameter_hash(self) -> str:
        """Return a hash of the base's weights, which is the same however they are sharded.

        All workers call it, and gather the weights one by one.
        """
        return parameter_hash(self.model)

    def lockstep(self) -> AbstractContextManager[None]:
        """Return a block inside which workers may run the base differently often: to decode.

        All workers enter and leave it. Only `zero3` needs it; elsewhere it does nothing.
        """
        return nullcontext() if self._engine is None else lockstep(self.model)


def load_frozen_base(config: FrozenBaseConfig, *, on_cpu: bool) -> FrozenBase:
    """Load the base inside a worker, on its device; all workers call it.

    Raises `ConfigError` for a sharding that cannot be had, and `CheckpointError` for a path that
    holds no causal LM.
    """
    assert config.path is not None, "the job has filled it in"
    architecture = load_architecture(config.path)
    world_size = dist.get_world_size()
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    check_sharding(config, architecture, num_workers=world_size, workers_per_node=per_node)
    # Ray Train has set each worker's device.
    device = torch.device("cpu" if on_cpu else f"cuda:{torch.cuda.current_device()}")
    if config.sharding == "zero3":
        return _load_partitioned(config, architecture, device=device)
    if config.sharding == "none":
        return FrozenBase(load_frozen(config.path, device=device, dtype=config.dtype))
    size = config.tensor_size or per_node
    copies = _Copies(tp_size=size, tp_plan="auto", dp_replicate_size=world_size // size)
    model = load_frozen(config.path, device=device, dtype=config.dtype, distributed=copies)
    return FrozenBase(model, tensor_size=size)


class _Copies(DistributedConfig):
    """Tensor groups that hold a copy each, and need nothing of each other.

    transformers would wrap the copies in FSDP to share gradients, which a frozen model has none
    of; and FSDP copies every weight in every forward.
    """

    @property
    def dp_size(self) -> int:
        return 1


def _load_partitioned(
    config: FrozenBaseConfig, architecture: PreTrainedConfig, *, device: torch.device
) -> FrozenBase:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    deepspeed = import_deepspeed(on_cpu=device.type == "cpu")
    if config.offload == "nvme":
        _check_asynchronous_io()
    # DeepSpeed has to know the dtype before it sees the weights.
    dtype: Any = str(resolve_dtype(config, architecture)).removeprefix("torch.")
    tree = _partition_config(config, architecture, dtype=dtype, on_gpu=device.type != "cpu")
    assert config.path is not None
    # While it lives, whatever is loaded is partitioned: it must not live to see the guide.
    partitioning = HfDeepSpeedConfig(tree)
    model = load_frozen(config.path, device=device, dtype=dtype)
    del partitioning
    engine: Any = deepspeed.initialize(model=model, config=tree)[0]
    # DeepSpeed records the order of layers from one forward of the whole model to the next, to
    # fetch ahead. Decoding calls parts of the model: the record would grow and never be right.
    engine.optimizer.fwd_pre_hook.remove()
    return FrozenBase(model, engine=engine)


def _partition_config(
    config: FrozenBaseConfig, architecture: PreTrainedConfig, *, dtype: str, on_gpu: bool
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if config.offload != "none":
        offload = zero["offload_param"] = {"device": config.offload, "pin_memory": on_gpu}
        if config.offload == "nvme":
            largest = count_parameters(architecture).largest_parameter
            offload["nvme_path"] = config.nvme_path
            # A share of a parameter is read into one buffer.
            offload["buffer_size"] = -(-largest // dist.get_world_size())
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number; nothing is trained
        "steps_per_print": 2**31 - 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "zero_optimization": zero,
    }


def _check_asynchronous_io() -> None:
    import deepspeed.ops.op_builder

    builder: Any = deepspeed.ops.op_builder
    if not builder.AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "base.offload is nvme, for which DeepSpeed needs libaio and its headers on every node, "
            "and finds none. Install libaio-dev, or set base.offload to cpu."
        )


def parameter_hash(model: nn.Module) -> str:
    """Return a hash of names, shapes, dtypes and bytes of a model's parameters.

    Sharded ones are gathered one by one, by all workers that share them.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        with _whole(parameter) as tensor:
            tensor = tensor.detach().cpu()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _whole(parameter: Tensor) -> Iterator[Tensor]:
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter
