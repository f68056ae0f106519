"""What an evaluation is told: what jobs that decode are told, and the settings to compare."""

from typing import Self

from pydantic import Field
from pydantic import model_validator as validates

from jobs.decoding_config import DecodingJobConfig, check_guide_names, with_paths
from pilotfish.evaluation.settings import Setting, with_controls


class EvaluationConfig(DecodingJobConfig):
    """One evaluation; `output` is the folder of its report."""

    title: str = "Evaluation"
    settings: tuple[Setting, ...] = Field(min_length=1)
    """What to compare; the controls come by themselves."""

    @validates(mode="after")
    def _check_settings(self) -> Self:
        check_guide_names(self.settings, self.guides)
        with_controls(self.settings)
        return self


def resolved(config: EvaluationConfig) -> EvaluationConfig:
    """Return the config with absolute paths and with the controls among its settings."""
    return with_paths(config).model_copy(update={"settings": with_controls(config.settings)})
