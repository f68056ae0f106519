"""The study of the miniature world: every way to answer, and all stages in their order."""

from collections.abc import Iterable, Mapping

from jobs.kitchen_stages import STAGES as KITCHEN
from jobs.reproduce.methods import Guided, Method, one
from jobs.reproduce.trainings import (
    MAX_SEEDS,
    MORL_SIDES,
    PROXY_PROMPTS,
    ROUNDS,
    SEARCHES,
    SEEDED,
    SOUP_WEIGHTS,
    TRAININGS,
    WARM_UPS,
    seeded,
    soup_name,
)
from jobs.stages import Stage, with_needs

NUM_QUESTIONS = 500
NUM_SEEDS = 3
NUM_ROLLED_OUT = 100
"""Questions that Transfer Q* answers: it rolls out some 20 tokens for each one it emits."""
NUM_INDIRECT = 60
NUM_DRAFTED, NUM_DRAFTS = 100, 64
"""Questions, and answers to each, of the best-of-N curve."""
GENARM_WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
ARGS_WEIGHTS = (1.0, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0)
TRANSFER_WEIGHTS = (1.0, 3.0, 10.0)
EQUAL_WEIGHT = 3.0
"""At which Transfer Q*, controlled decoding and ARGS are compared."""
MIX_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the helpful side."""
GATES = (0.2, 0.5, 0.9)
"""Nats of the base's entropy below which GenARM does not act."""
UPSTREAMS: Mapping[str, str] = {
    "base": "base",
    "base_m": "larger base",
    "base_xs": "smaller base",
    "dpo": "DPO",
    "ppo": "PPO-RLHF",
    "genarm": "GenARM",
}
"""What the Aligner corrects. It was trained on answers of none of them, but of the corpus."""


def _transfer(weight: float, *, rollout: str = "dpo", **settings: object) -> dict[str, Guided]:
    models = {"rollout": rollout, "reward": "reward_model"}
    if settings.get("mode") == "indirect":
        models["baseline_reward"] = "reward_helpful"
    return {
        "transfer_q": Guided(kind="transfer_q", models=models, settings=settings, weight=weight)
    }


# Raw rewards, of one unit: a Bradley-Terry pair. DPO's beta and both rewards are in it.
_RAW = {"shift": 0.0, "scale": 1.0, "num_candidates": 5, "num_rollouts": 4}


def _headline() -> Iterable[tuple[str, Method]]:
    yield "base", Method(label="base, T=0.7")
    yield "base_t1", Method(label="base, T=1", temperature=1)
    yield "base_t05", Method(label="base, T=0.5", temperature=0.5)
    yield "base_t035", Method(label="base, T=0.35", temperature=0.35)
    yield "base_greedy", Method(label="base, greedy", temperature=0)
    for number in range(1, MAX_SEEDS + 1):
        genarm, dpo, proxy, aligner = (seeded(stage, number) for stage in SEEDED)
        yield genarm, Method(label="GenARM w=1", guides=one(genarm))
        yield dpo, Method(label="DPO", base=dpo)
        yield proxy, Method(label="Proxy-RLHF", guides=one(proxy), temperature=1)
        yield aligner, Method(label="Aligner on base", guides=one(aligner))
    yield "ppo", Method(label="PPO-RLHF", base="ppo")


def _proxy() -> Iterable[tuple[str, Method]]:
    for num in PROXY_PROMPTS:
        name = f"proxy_{num}"
        yield name, Method(label=f"{num} prompts", guides=one(name), temperature=1)
    for name, label in (
        ("proxy_untrained", "untrained"),
        ("proxy_free", "restriction off"),
        ("proxy_iid", "order off (iid)"),
        ("proxy_literal", "literal rule"),
    ):
        yield name, Method(label=label, guides=one(name), temperature=1)
    off = one("proxy", p_t=0.0, p_t_rule="nucleus")
    yield "proxy_off", Method(label="p_t=0", guides=off, temperature=1)
    iid = one("proxy", p_t=0.0, p_t_rule="cumulative", candidate_order="iid", top_k=129)
    yield (
        "proxy_off_iid",
        Method(
            label="p_t=0, order iid",
            guides=iid,
            temperature=1,
            num=50,
        ),
    )
    yield "unseen_base", Method(label="base", temperature=1, questions="unseen")
    yield (
        "unseen_proxy",
        Method(label="trained with them", guides=one("proxy"), temperature=1, questions="unseen"),
    )
    yield (
        "unseen_proxy_seen",
        Method(label="never met them", guides=one("proxy_seen"), temperature=1, questions="unseen"),
    )


def _genarm() -> Iterable[tuple[str, Method]]:
    for weight in GENARM_WEIGHTS:
        guides = one("genarm", weight=weight)
        yield f"genarm_w{weight:g}", Method(label=f"w={weight:g}", guides=guides, temperature=1)
    yield "genarm_greedy", Method(label="GenARM w=1, greedy", guides=one("genarm"), temperature=0)
    yield "dpo_greedy", Method(label="DPO, greedy", base="dpo", temperature=0)
    # base * (dpo / base)^1 is DPO itself, told with its divergence from the base.
    ratio = Guided(kind="proxy_tuning", models={"expert": "dpo", "anti_expert": "base"})
    yield "dpo_t1", Method(label="DPO, T=1", guides={"dpo": ratio}, temperature=1)
    best = Guided(kind="best_of_n", models={"reward": "reward_model"}, settings={"num_drafts": 16})
    yield "best_of_16", Method(label="best of 16", guides={"best_of_n": best}, temperature=1)
    yield "pargs", Method(label="PARGS w=6", guides=one("reward_prefix", weight=6), temperature=0)
    yield from _weak_to_strong()


def _weak_to_strong() -> Iterable[tuple[str, Method]]:
    yield "base_xs", Method(label="smaller base", base="base_xs")
    guide = one("genarm_xs")
    yield "weak_base_xs", Method(label="smaller base + xs guide", base="base_xs", guides=guide)
    for temperature, suffix in ((0.7, ""), (0.0, "_greedy")):
        for base, label in (("base", "base"), ("base_m", "larger base")):
            yield (
                f"weak_{base}{suffix}",
                Method(
                    label=f"{label} + xs guide", base=base, guides=guide, temperature=temperature
                ),
            )
        yield f"base_m{suffix}", Method(label="larger base", base="base_m", temperature=temperature)
        yield (
            f"dpo_m{suffix}",
            Method(label="DPO of the larger base", base="dpo_m", temperature=temperature),
        )


def _front() -> Iterable[tuple[str, Method]]:
    for weight in MIX_WEIGHTS:
        guides = {
            **one("genarm_helpful", weight=weight),
            **one("genarm_harmless", weight=1 - weight),
        }
        yield mix_name(weight), Method(label=f"GenARM {weight:g} helpful", guides=guides)
    for side in MORL_SIDES:
        yield f"only_{side}", Method(label=f"GenARM {side}", guides=one(f"genarm_{side}"))
        yield f"dpo_{side}", Method(label=f"DPO {side}", base=f"dpo_{side}")
        yield f"morl_{side}", Method(label=f"MORL {side}", base=f"morl_{side}")
    yield "soup", Method(label="soup 0.5", base="soup")
    yield "morl", Method(label="MORL 0.5", base="morl")
    for weight in SOUP_WEIGHTS:
        yield soup_name(weight), Method(label=f"soup {weight:g}", base=soup_name(weight))


def mix_name(weight: float) -> str:
    return f"mix_{round(100 * weight)}"


def _transfer_q() -> Iterable[tuple[str, Method]]:
    for weight in TRANSFER_WEIGHTS:
        yield (
            f"transfer_w{weight:g}",
            Method(
                label=f"Transfer Q* w={weight:g}",
                guides=_transfer(weight),
                temperature=0,
                num=NUM_ROLLED_OUT,
            ),
        )
    value = one("value", weight=EQUAL_WEIGHT, num_candidates=10)
    yield (
        "cd_equal",
        Method(label=f"CD w={EQUAL_WEIGHT:g}", guides=value, temperature=0, num=NUM_ROLLED_OUT),
    )
    naive = _transfer(2.0, rollout="dpo_helpful", **_RAW)
    yield (
        "transfer_naive",
        Method(label="direct, naive", guides=naive, temperature=0, num=NUM_INDIRECT),
    )
    indirect = _transfer(2.0, rollout="dpo_helpful", mode="indirect", beta=0.3, **_RAW)
    yield (
        "transfer_indirect",
        Method(label="indirect", guides=indirect, temperature=0, num=NUM_INDIRECT),
    )


def _aligner() -> Iterable[tuple[str, Method]]:
    for upstream, label in UPSTREAMS.items():
        if upstream == "base":
            continue
        base = "base" if upstream == "genarm" else upstream
        guides = {**(one("genarm") if upstream == "genarm" else {}), **one("aligner")}
        yield f"aligned_{upstream}", Method(label=f"Aligner on {label}", base=base, guides=guides)
    for share in WARM_UPS:
        name = f"aligner_{round(100 * share)}"
        yield name, Method(label=f"{share:.0%} warm-up", guides=one(name))
    twice = {**one("aligner"), "again": Guided(stage="aligner")}
    yield "aligner_twice", Method(label="Aligner twice", guides=twice)
    for name in ROUNDS:
        yield name, Method(label=name, base=name)
    copyist = {"copyist": Guided(kind="copyist")}
    yield "aligner_copyist", Method(label="identity Aligner", guides=copyist)


def _limits() -> Iterable[tuple[str, Method]]:
    for weight in ARGS_WEIGHTS:
        guides = one("reward_model", weight=weight)
        label = f"ARGS w={weight:g}"
        yield args_name(weight), Method(label=label, guides=guides, temperature=0)
    yield (
        "drafts",
        Method(label="drafts", temperature=1, num=NUM_DRAFTED, copies=NUM_DRAFTS),
    )
    for gate in GATES:
        guides = one("genarm", gate=gate)
        yield f"genarm_gate{gate:g}", Method(label=f"GenARM, gate {gate:g}", guides=guides)


def args_name(weight: float) -> str:
    return f"args_w{weight:g}"


METHODS: Mapping[str, Method] = {
    **dict(_headline()),
    **dict(_proxy()),
    **dict(_genarm()),
    **dict(_front()),
    **dict(_transfer_q()),
    **dict(_aligner()),
    **dict(_limits()),
}
"""By the name under which each is kept."""


def stages(
    methods: Iterable[str], extra: Iterable[str], *, num: int = NUM_QUESTIONS
) -> dict[str, Stage]:
    """Return what it takes to measure these methods and to run these other stages, in order."""
    measuring = {
        f"measure {name}": Stage(
            "jobs.reproduce.measure",
            (name, "--root", "{root}", "--prompts", str(num)),
            tuple(METHODS[name].stages),
        )
        for name in METHODS
    }
    every = {**KITCHEN, **TRAININGS, **SEARCHES, **ROUNDS, **measuring}
    wanted = [*(f"measure {name}" for name in methods), *extra]
    return {name: every[name] for name in with_needs(wanted, every)}
