"""Decode a few requests in vLLM with guides, and print what it reports. Runs where vLLM is.

Shapes: V vocabulary. Reads a JSON object from stdin, writes one to the file named in it.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams  # pyright: ignore[reportAttributeAccessIssue]
from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]


def main() -> None:
    asked = json.load(sys.stdin)
    llm = LLM(
        model=asked["base"],
        dtype="float32",
        max_model_len=256,
        max_logprobs=-1,
        logprobs_mode="processed_logprobs",
        logits_processors=["pilotfish.vllm_plugin:GenARMLogitsProcessor"],
        **asked["engine"],
    )
    refused = []
    for extra_args in asked["bad"]:
        try:
            llm.generate("x", SamplingParams(max_tokens=1, extra_args=extra_args))
        except VLLMValidationError as error:
            refused.append(str(error))
    params = [
        SamplingParams(logprobs=-1, ignore_eos=True, **request["params"])
        for request in asked["requests"]
    ]
    prompts = [{"prompt_token_ids": request["prompt"]} for request in asked["requests"]]
    answers = []
    for output in llm.generate(prompts, params):
        [completion] = output.outputs
        answers.append(
            {
                "token_ids": list(completion.token_ids),
                "logprobs": [
                    {token_id: entry.logprob for token_id, entry in position.items()}
                    for position in completion.logprobs
                ],
            }
        )
    preemptions = [
        metric.value
        for metric in (llm.get_metrics() if asked["metrics"] else [])
        if metric.name == "vllm:num_preemptions"
    ]
    found = {"refused": refused, "answers": answers, "num_preemptions": sum(preemptions)}
    Path(asked["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
