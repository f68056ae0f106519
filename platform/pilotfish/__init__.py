"""Pilotfish: small trained guides steer a large frozen language model while it decodes."""

from pilotfish.decode.sequence import Completion, Drafting, FinishReason, SamplingParams
from pilotfish.errors import PilotfishError
from pilotfish.pilot import Pilot

__all__ = ["Completion", "Drafting", "FinishReason", "Pilot", "PilotfishError", "SamplingParams"]
__version__ = "0.1.0"
