"""Guides inside transformers' `generate`: a logits processor per guide, or our loop as its own."""

from pilotfish.hf.generate import guided_generate
from pilotfish.hf.loading import load_guides
from pilotfish.hf.processor import GuideLogitsProcessor

__all__ = ["GuideLogitsProcessor", "guided_generate", "load_guides"]
