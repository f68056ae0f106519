"""How models learn: one file per objective, all run by the same loop."""

from typing import Annotated, TypeAlias

from pydantic import Field

from pilotfish.train.objectives.aligner import ALIGNER, AlignerConfig
from pilotfish.train.objectives.base import Batch, LossOutput, Models, Objective
from pilotfish.train.objectives.dpo import DPO, DPOConfig
from pilotfish.train.objectives.genarm import GENARM, GenARMConfig
from pilotfish.train.objectives.reward_model import REWARD_MODEL, RewardModelConfig
from pilotfish.train.objectives.sft import SFT, SFTConfig
from pilotfish.train.objectives.value import VALUE, ValueConfig

SupervisedConfig: TypeAlias = Annotated[
    SFTConfig | RewardModelConfig | GenARMConfig | ValueConfig | DPOConfig | AlignerConfig,
    Field(discriminator="kind"),
]

OBJECTIVES: dict[str, Objective] = {
    "sft": SFT,
    "reward_model": REWARD_MODEL,
    "genarm": GENARM,
    "value": VALUE,
    "dpo": DPO,
    "aligner": ALIGNER,
}

__all__ = [
    "OBJECTIVES",
    "AlignerConfig",
    "Batch",
    "DPOConfig",
    "GenARMConfig",
    "LossOutput",
    "Models",
    "Objective",
    "RewardModelConfig",
    "SFTConfig",
    "SupervisedConfig",
    "ValueConfig",
]
