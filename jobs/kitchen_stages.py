"""The trainings of the kitchen and what each needs."""

from collections.abc import Mapping

from jobs.stages import Stage


def _training(name: str, *needs: str) -> Stage:
    arguments = (f"jobs/configs/kitchen/{name}.yaml", "root={root}", "scaling.num_workers=1")
    return Stage("jobs.train", arguments, needs)


STAGES: Mapping[str, Stage] = {
    "base": _training("base"),
    "base_m": _training("base_m"),
    "reward_model": _training("reward_model", "base"),
    "aligner": _training("aligner", "base"),
    "genarm": _training("genarm", "base"),
    "proxy": _training("proxy", "base", "reward_model"),
    "dpo": _training("dpo", "base"),
    "ppo": _training("ppo", "base", "reward_model"),
    "reward_helpful": _training("reward_helpful", "base"),
    "reward_harmless": _training("reward_harmless", "base"),
    "morl": _training("morl", "base", "reward_helpful", "reward_harmless"),
    "proxy_mara": _training("proxy_mara", "base", "reward_model"),
    "reward_prefix": _training("reward_prefix", "base"),
    "value": _training("value", "base"),
    "value_q": _training("value_q", "base"),
    "dpo_helpful": _training("dpo_helpful", "base"),
    "dpo_harmless": _training("dpo_harmless", "base"),
    "genarm_helpful": _training("genarm_helpful", "base"),
    "genarm_harmless": _training("genarm_harmless", "base"),
    "soup": Stage(
        "jobs.export",
        (
            "--replace",
            "--soup",
            "{root}/kitchen/dpo_helpful=0.5",
            "{root}/kitchen/dpo_harmless=0.5",
            "{root}/kitchen/soup",
        ),
        needs=("dpo_helpful", "dpo_harmless"),
    ),
}
"""In the order in which they are begun, as far as their needs allow."""
