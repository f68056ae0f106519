"""The prompts of a job that decodes, and words for where they come from."""

import logging

from transformers import PreTrainedTokenizerBase

from jobs.decoding_config import KitchenPrompts, RowPrompts
from pilotfish import world
from pilotfish.chat import render_prompt
from pilotfish.data.loading import load_prompts
from pilotfish.data.records import PromptText
from pilotfish.errors import DataError

logger = logging.getLogger(__name__)


def prompts_of(
    config: KitchenPrompts | RowPrompts, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[PromptText], str]:
    """Return the prompts and a description. Raises `DataError` for fewer than two."""
    if isinstance(config, KitchenPrompts):
        scenes = world.scenes(config.skip + config.num, config.seed)[config.skip :]
        prompts: list[PromptText] = [tuple(scene.messages) for scene in scenes]
        return prompts, f"{config.num} questions of the kitchen, seed {config.seed}"
    loaded = load_prompts(config, part=config.part).records
    kept, note = loaded, ""
    limit = config.max_tokens
    if limit is not None:
        kept = [prompt for prompt in loaded if len(render_prompt(tokenizer, prompt)) <= limit]
        note = f"; {len(loaded) - len(kept)} of {len(loaded)} had more than {limit} tokens"
        logger.info("prompts of %s%s", config, note)
    kept = kept[config.skip :][: config.num]
    if len(kept) < 2:
        raise DataError(
            f"{config} gives {len(kept)} prompts{note}, wanted at least two. Raise "
            "prompts.max_tokens, or give more rows."
        )
    return kept, f"{len(kept)} {config.part} prompts of {config}{note}"
