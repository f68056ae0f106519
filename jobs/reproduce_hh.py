"""The papers' study on real models: HH-RLHF with LLaMA-7B, as stages in the order of their needs.

What each reproduces, and which settings are the papers', is in the comments of the configs. Two
objectives are on PKU-SafeRLHF; weak to strong is from 7B to 13B.
"""

from collections.abc import Mapping

from jobs.stages import Stage

_STRONG = "huggyllama/llama-13b"


def _stage(module: str, config: str, *overrides: str, needs: tuple[str, ...] = ()) -> Stage:
    arguments = (f"jobs/configs/reproduce/{config}.yaml", "root={root}", *overrides)
    return Stage(module, arguments, needs)


def _training(config: str, *needs: str) -> Stage:
    return _stage("jobs.train", config, needs=needs)


def _evaluation(config: str, *needs: str) -> Stage:
    return _stage("jobs.evaluate", f"evaluate_{config}", needs=("reward_model", *needs))


def _model(name: str) -> Stage:
    """Return the evaluation of a trained model on its own."""
    overrides = (
        f"base={{root}}/reproduce/{name}",
        f"output={{root}}/reproduce/evaluation/{name}",
    )
    return _stage(
        "jobs.evaluate", "evaluate_model", *overrides, needs=("reward_model", name)
    )


def _harmless(config: str, *overrides: str) -> Stage:
    """Return a training on PKU-SafeRLHF for the other objective than the config's."""
    output = f"output={{root}}/reproduce/{config}_harmless"
    return _stage("jobs.train", config, output, "data.objective=safer", *overrides)


def _safe(config: str, name: str, judge: str, *needs: str, base: bool = True) -> Stage:
    """Return an evaluation on PKU-SafeRLHF by one of the two rewards."""
    overrides = (
        f"output={{root}}/reproduce/evaluation/{name}_{judge}",
        f"reward.path={{root}}/reproduce/safe_reward_{judge}",
        *((f"base={{root}}/reproduce/{name}",) if base else ()),
    )
    needs = (f"safe_reward_{judge}", *needs)
    return _stage("jobs.evaluate", f"evaluate_{config}", *overrides, needs=needs)


def _soup(share: float) -> Stage:
    folders = (
        f"{{root}}/reproduce/safe_dpo_helpful={share}",
        f"{{root}}/reproduce/safe_dpo_harmless={round(1 - share, 3)}",
        f"{{root}}/reproduce/safe_soup_{share}",
    )
    return Stage(
        "jobs.export",
        ("--replace", "--soup", *folders),
        needs=("safe_dpo_helpful", "safe_dpo_harmless"),
    )


_SHARES = (0.2, 0.4, 0.6, 0.8)
"""Of the helpful model in the soups; the ends are the models themselves."""
_FRONT = ("safe_dpo_helpful", "safe_dpo_harmless", *(f"safe_soup_{one}" for one in _SHARES))

STAGES: Mapping[str, Stage] = {
    "base": _training("base"),
    "reward_model": _training("reward_model", "base"),
    "genarm": _training("genarm", "base"),
    "dpo": _training("dpo", "base"),
    "proxy": _training("proxy", "base", "reward_model"),
    "ppo": _training("ppo", "base", "reward_model"),
    "aligner": _training("aligner", "base"),
    "answers": _stage("jobs.answer", "answers", needs=("base", "reward_model")),
    "value": _training("value", "base", "answers"),
    "transfer_q": _stage("jobs.guide", "transfer_q", needs=("base", "dpo", "reward_model")),
    "best_of_n": _stage("jobs.guide", "best_of_n", needs=("base", "reward_model")),
    "evaluate_genarm": _evaluation("genarm", "base", "genarm"),
    "evaluate_dpo": _model("dpo"),
    "evaluate_ppo": _model("ppo"),
    "evaluate_args": _evaluation("args", "base"),
    "evaluate_best_of_n": _evaluation("best_of_n", "base", "best_of_n"),
    "evaluate_controlled_decoding": _evaluation("controlled_decoding", "base", "value"),
    "evaluate_proxy": _evaluation("proxy", "base", "proxy"),
    "evaluate_aligner": _evaluation("aligner", "base", "genarm", "aligner"),
    "evaluate_transfer_q": _evaluation("transfer_q", "base", "transfer_q"),
    "search_proxy": _stage(
        "tune.search", "search_proxy", needs=("base", "reward_model", "proxy")
    ),
    "search_genarm": _stage(
        "tune.search", "search_genarm", needs=("base", "reward_model", "genarm")
    ),
    "base_13b": _stage(
        "jobs.train", "base", "output={root}/reproduce/base_13b", f"model.init={_STRONG}"
    ),
    "dpo_13b": _stage(
        "jobs.train",
        "dpo",
        "output={root}/reproduce/dpo_13b",
        "model.init={root}/reproduce/base_13b",
        "base.path={root}/reproduce/base_13b",
        needs=("base_13b",),
    ),
    "evaluate_weak_to_strong": _evaluation("weak_to_strong", "base_13b", "genarm"),
    "evaluate_dpo_13b": _model("dpo_13b"),
    "safe_reward_helpful": _training("safe_reward"),
    "safe_reward_harmless": _harmless("safe_reward"),
    "safe_genarm_helpful": _training("safe_genarm"),
    "safe_genarm_harmless": _harmless("safe_genarm", "objective.beta_r=0.01"),
    "safe_dpo_helpful": _training("safe_dpo"),
    "safe_dpo_harmless": _harmless("safe_dpo"),
    "safe_morl": _training("safe_morl", "safe_reward_helpful", "safe_reward_harmless"),
    **{f"safe_soup_{share}": _soup(share) for share in _SHARES},
    **{
        f"evaluate_safe_genarm_{judge}": _safe(
            "safe_genarm",
            "safe_genarm",
            judge,
            "safe_genarm_helpful",
            "safe_genarm_harmless",
            base=False,
        )
        for judge in ("helpful", "harmless")
    },
    **{
        f"evaluate_{name}_{judge}": _safe("safe_model", name, judge, name)
        for name in ("safe_morl", *_FRONT)
        for judge in ("helpful", "harmless")
    },
    "judge": _stage(
        "jobs.judge",
        "judge",
        needs=(
            "evaluate_genarm",
            "evaluate_dpo",
            "evaluate_ppo",
            "evaluate_args",
            "evaluate_best_of_n",
            "evaluate_controlled_decoding",
            "evaluate_proxy",
            "evaluate_aligner",
            "evaluate_transfer_q",
        ),
    ),
}
"""In the order in which they are begun, as far as their needs allow."""
