"""What the study trains beyond the kitchen's own stages: other seeds, sizes, data and rules."""

from collections.abc import Mapping

from jobs.kitchen_stages import STAGES as KITCHEN
from jobs.stages import Stage

MAX_SEEDS = 5
SEEDED = ("genarm", "dpo", "proxy", "aligner")
"""The headline rows: trained anew with other seeds, on the one base."""
PROXY_PROMPTS = (24, 96, 192)
"""Prompts that a proxy is trained on where it has fewer of them; each is seen more often."""
ALL_PROXY_PROMPTS = 384
"""What `proxy.yaml` sees: 24 iterations of 16."""
WARM_UPS = (0.0, 0.5)
"""Shares of copying in the Aligner's training, beside the 0.1875 of `aligner.yaml`."""
SOUP_WEIGHTS = (0.25, 0.75)
"""Of the helpful model, beside the half and the ends that are there."""
MORL_SIDES = ("helpful", "harmless")

_OUT = "output={root}/reproduce/models/"
_NO_TRACKING = "tracking.register_as=null"


def seeded(stage: str, number: int) -> str:
    """Return the name of a stage that was trained with seed `number`, from 1."""
    return stage if number == 1 else f"{stage}_seed{number}"


def _train(name: str, config: str, *overrides: str, needs: tuple[str, ...] = ()) -> Stage:
    """A training of a kitchen config with overrides; it needs what the config itself needs."""
    arguments = (
        f"jobs/configs/kitchen/{config}.yaml",
        "root={root}",
        "scaling.num_workers=1",
        _OUT + name,
        _NO_TRACKING,
        *overrides,
    )
    own = KITCHEN[config].needs if config in KITCHEN else ()
    return Stage("jobs.train", arguments, tuple(dict.fromkeys((*own, *needs))))


def _soup(weight: float) -> Stage:
    parts = (
        f"{{root}}/kitchen/dpo_helpful={weight}",
        f"{{root}}/kitchen/dpo_harmless={1 - weight}",
    )
    output = "{root}/reproduce/models/" + soup_name(weight)
    return Stage(
        "jobs.export", ("--replace", "--soup", *parts, output), ("dpo_helpful", "dpo_harmless")
    )


def soup_name(weight: float) -> str:
    return f"soup_{round(100 * weight)}"


def _morl(side: str) -> Stage:
    judge = f'{{{{judge: {{{{kind: model, path: "{{root}}/kitchen/reward_{side}"}}}}}}}}'
    critic = f"objective.critic={{root}}/kitchen/reward_{side}"
    return _train(f"morl_{side}", "morl", f"rollout.rewards=[{judge}]", critic)


_SEEN_PROMPTS = "{root}/reproduce/seen_prompts.jsonl"

TRAININGS: Mapping[str, Stage] = {
    "base_xs": _train("base_xs", "base_xs"),
    "genarm_xs": _train(
        "genarm_xs",
        "genarm_xs",
        "model.init={root}/reproduce/models/base_xs",
        needs=("base_xs",),
    ),
    "dpo_m": _train("dpo_m", "dpo", "model.init={root}/kitchen/base_m", needs=("base_m",)),
    **{
        seeded(stage, number): _train(seeded(stage, number), stage, f"seed={100 * number}")
        for number in range(2, MAX_SEEDS + 1)
        for stage in SEEDED
    },
    "proxy_untrained": _train(
        "proxy_untrained", "proxy", "train.steps=1", "train.learning_rate=1.0e-12"
    ),
    **{f"proxy_{num}": _train(f"proxy_{num}", "proxy", f"data.num={num}") for num in PROXY_PROMPTS},
    "proxy_free": _train("proxy_free", "proxy", "objective.settings.p_t=0.0"),
    "proxy_iid": _train("proxy_iid", "proxy", "objective.settings.candidate_order=iid"),
    "proxy_literal": _train("proxy_literal", "proxy", "objective.settings.p_t_rule=literal"),
    "seen_prompts": Stage("jobs.reproduce.seen_prompts", (_SEEN_PROMPTS,)),
    "proxy_seen": _train(
        "proxy_seen",
        "proxy",
        f"data={{{{path: {_SEEN_PROMPTS}, holdout: 200, limits: {{{{max_length: 128}}}}}}}}",
        needs=("seen_prompts",),
    ),
    **{
        f"aligner_{round(100 * share)}": _train(
            f"aligner_{round(100 * share)}", "aligner", f"objective.identity_share={share}"
        )
        for share in WARM_UPS
    },
    **{soup_name(weight): _soup(weight) for weight in SOUP_WEIGHTS},
    **{f"morl_{side}": _morl(side) for side in MORL_SIDES},
}
"""In the order in which they are begun, as far as their needs allow."""

SEARCHES: Mapping[str, Stage] = {
    "search_proxy": Stage(
        "tune.search",
        (
            "tune/configs/kitchen/proxy.yaml",
            "root={root}",
            "output={root}/reproduce/search_proxy",
            "decoding.num_actors=1",
            "--resume",
        ),
        ("base", "proxy"),
    ),
}

_ROUNDS = (
    "jobs/configs/kitchen/rounds.yaml",
    "root={root}",
    "decoding.num_actors=1",
    "training.scaling.num_workers=1",
)
ROUNDS: Mapping[str, Stage] = {
    "rounds_aligner": Stage(
        "jobs.rounds",
        (*_ROUNDS, _OUT + "rounds_aligner", "pairs.actors.num_actors=1"),
        ("base", "aligner"),
    ),
    "rounds_self": Stage(
        "jobs.rounds",
        (
            *_ROUNDS,
            _OUT + "rounds_self",
            "pairs={{kind: self, num_answers: 8, "
            'reward: {{kind: model, path: "{root}/kitchen/reward_model"}}}}',
        ),
        ("base", "reward_model"),
    ),
}
