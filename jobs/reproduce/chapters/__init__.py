"""The chapters of the study, in the order in which they are read."""

from collections.abc import Mapping

from jobs.reproduce.chapter import ChapterSpec
from jobs.reproduce.chapters import aligner, genarm, limits, proxy, transfer_q

CHAPTERS: Mapping[str, ChapterSpec] = {
    "proxy": proxy.SPEC,
    "genarm": genarm.SPEC,
    "transfer_q": transfer_q.SPEC,
    "aligner": aligner.SPEC,
    "limits": limits.SPEC,
}
