"""Where a policy stands: what its completions earn, and how far they are from the base's."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from jobs.rollouts import Rollout
from pilotfish.decode.sequence import FinishReason
from pilotfish.train.metrics import Tally

logger = logging.getLogger(__name__)

_MAX_BAD_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Standing:
    """Means over completions."""

    tallies: Mapping[str, Tally]
    """Squares of rewards are there for their errors. What a monitor does not say counts 0 times."""

    @classmethod
    def of(cls, rollout: Rollout) -> "Standing":
        """Sum up a rollout."""
        episodes = rollout.episodes
        cut = [one.finish_reason == FinishReason.LENGTH for one in episodes]
        gaps = [float((one.logprobs_N - one.base_logprobs_N).sum()) for one in episodes]
        tallies = {
            "reward": _tally(rollout.rewards),
            "squared_reward": _tally([reward**2 for reward in rollout.rewards]),
            "length": _tally([len(one.completion_ids) for one in episodes]),
            "cut_share": _tally(cut),
            "kl": _tally(gaps),
        }
        if rollout.monitored is not None:
            true = [one.reward for one in rollout.monitored if one.reward is not None]
            bad = [one.bad for one in rollout.monitored if one.bad is not None]
            tallies |= {
                "true_reward": _tally(true),
                "squared_true_reward": _tally([reward**2 for reward in true]),
                "bad_share": _tally(bad),
            }
        return cls(tallies)

    def mean(self, name: str) -> float:
        return self.tallies[name].mean

    def error(self, name: str) -> float:
        """Return the standard error of a mean."""
        mean, count = self.mean(name), self.tallies[name].count
        return math.sqrt(max(self.mean(f"squared_{name}") - mean**2, 0.0) / max(count - 1, 1))

    def report(self, prefix: str) -> dict[str, float]:
        """Return means, and standard errors of rewards, as metrics."""
        report = {}
        for name in (name for name, one in self.tallies.items() if one.count):
            if not name.startswith("squared_"):
                report[f"{prefix}/{name}"] = self.mean(name)
            else:
                reward = name.removeprefix("squared_")
                report[f"{prefix}/{reward}_error"] = self.error(reward)
        return report


def warn_of_collapse(now: Standing, untrained: Standing) -> None:
    """Warn where the policy leaves the language, or earns what the monitor does not confirm."""
    if "true_reward" not in now.tallies:
        return
    bad = now.mean("bad_share")
    if bad > _MAX_BAD_SHARE:
        logger.warning(
            "COLLAPSE: %.0f%% of the held-out answers are broken. Restrict the policy (a smaller "
            "p_t, p_t_rule=nucleus, beta_kl above 0), or stop at an earlier checkpoint.",
            100 * bad,
        )
    fall = untrained.mean("true_reward") - now.mean("true_reward")
    noise = math.hypot(untrained.error("true_reward"), now.error("true_reward"))
    if now.mean("reward") > untrained.mean("reward") and fall > 2 * noise:
        logger.warning(
            "REWARD HACKING: since the beginning the reward rose from %.2f to %.2f, while the true "
            "reward fell from %.2f to %.2f. Restrict the policy, or train a better reward model.",
            untrained.mean("reward"),
            now.mean("reward"),
            untrained.mean("true_reward"),
            now.mean("true_reward"),
        )


def _tally(values: list[float] | list[int] | list[bool]) -> Tally:
    return Tally(float(sum(values)), float(len(values)))
