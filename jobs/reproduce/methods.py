"""Ways to answer, as data: which models, which guides, how tokens are drawn.

Models are named by the stage that makes them; `folder_of` says where each lies.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jobs.kitchen_stages import STAGES as KITCHEN
from jobs.resolve import content_hash, identity
from pilotfish import world
from pilotfish.data.records import PromptText
from pilotfish.world.scene import DISHES, NAMES

SEED = 1001
"""Of the questions: no training, and no search, has seen them."""
MAX_TOKENS = 100
UNSEEN_DISHES = ("curry", "roast")
UNSEEN_NAMES = ("leo", "eva")
"""Of the proxy that was trained without them."""
JUDGE = "reward_model"
"""The stage whose reward model scores every answer beside the truth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guided:
    """One guide in a way to answer: the folder of a stage, or a kind over models of stages."""

    stage: str | None = None
    kind: str | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    """Stage by the setting of the kind that wants its folder."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Decode-time settings, the `gate` of a token guide included."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to answer the questions."""

    label: str
    base: str = "base"
    guides: Mapping[str, Guided] = field(default_factory=dict)
    """In the order in which they act."""
    temperature: float = 0.7
    num: int | None = None
    """The first so many questions, where all of them would take too long."""
    copies: int = 1
    """Answers to each question, side by side."""
    questions: Literal["new", "unseen"] = "new"

    @property
    def stages(self) -> list[str]:
        """The stages whose folders it reads, the judge's included."""
        named = [self.base, JUDGE]
        for guide in self.guides.values():
            named += [*([guide.stage] if guide.stage else []), *guide.models.values()]
        return list(dict.fromkeys(named))

    def num_questions(self, num: int) -> int:
        return num if self.num is None else min(self.num, num)

    def prompts(self, num: int) -> list[PromptText]:
        """Return the prompts, one per answer, of a study on `num` questions."""
        scenes = questions(self.questions, self.num_questions(num))
        return [tuple(scene.messages) for scene in scenes for _ in range(self.copies)]

    def digest(self, root: Path, num: int) -> str:
        """Return a hash of all that decides the answers; models count by their own hashes."""
        models = {stage: identity(str(folder_of(root, stage))) for stage in self.stages}
        asked = [self.num_questions(num), SEED, MAX_TOKENS]
        return content_hash({**asdict(self), "label": "", "num": asked, "stages": models})


def questions(kind: Literal["new", "unseen"], num: int) -> list[world.Scene]:
    """Return new scenes; `unseen` ones are of names and dishes that a proxy never met."""
    if kind == "new":
        return world.scenes(num, SEED)
    share = len(UNSEEN_DISHES) * len(UNSEEN_NAMES) / (len(DISHES) * len(NAMES))
    drawn = world.scenes(int(3 * num / share) + 200, SEED)
    return [one for one in drawn if one.dish in UNSEEN_DISHES and one.name in UNSEEN_NAMES][:num]


def folder_of(root: Path, stage: str) -> Path:
    """Return the folder that a stage writes: the kitchen's own lie beside each other."""
    return root / "kitchen" / stage if stage in KITCHEN else root / "reproduce" / "models" / stage


def one(stage: str, *, weight: float = 1.0, **settings: Any) -> dict[str, Guided]:
    """Return a single guide from the folder of a stage."""
    return {stage: Guided(stage=stage, weight=weight, settings=settings)}
