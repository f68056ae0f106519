"""The judge's job against a real HTTP server of the OpenAI wire format, in this process."""

import json
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.judge import Judged, judge, main
from jobs.judge_config import JudgeConfig
from jobs.judge_endpoint import EndpointError
from pilotfish import config as configs
from pilotfish.errors import ConfigError, DataError
from pilotfish.evaluation.report import Answer, save_report
from pilotfish.evaluation.settings import Setting
from pilotfish.evaluation.summary import About, Decoded, summarise

NUM = 6
PROMPTS = [f"\n\nHuman: question {number}\n\nAssistant:" for number in range(NUM)]

CONFIG = """
root: {root}
output: ${{root}}/judged
template: {root}/template.txt
contestants:
  good: {{report: "${{root}}/report", setting: guided}}
  poor: {{report: "${{root}}/report", setting: base}}
  other: {{report: "${{root}}/other", setting: guided}}
pairs: [[good, poor]]
endpoint:
  model: a-judge
  base_url: {url}
  api_key_env: null
  max_concurrent: 3
tracking: {{enabled: false}}
"""

Reply = Callable[[str, str], str | int]


class Endpoint(ThreadingHTTPServer):
    """Answers chat completions by a function of the two answers shown; an integer is a status."""

    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()

    def answer(self, body: dict[str, Any]) -> str | int:
        [message] = body["messages"]
        question, first, second = message["content"].split("|")
        with self._lock:
            self.bodies.append(body)
            self.asked.append(message["content"])
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self.reply(first, second)
        finally:
            with self._lock:
                self._now -= 1


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = self.server.answer(body)
        status = said if isinstance(said, int) else 200
        sent: dict[str, Any] = {"error": {"message": "not now"}}
        if isinstance(said, str):
            message = {"role": "assistant", "content": said}
            sent = {
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
            }
        content = json.dumps(sent).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal quiet."""


def by_words(first: str, second: str) -> str:
    """The more words the better, up to 10."""
    scores = [min(10, 1 + len(answer.split())) for answer in (first, second)]
    return f"{scores[0]} {scores[1]}\nso many words"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint(by_words)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def write_report(folder: Path, answers: dict[str, list[str]], prompts: list[str]) -> None:
    every = [
        Decoded(
            setting=Setting(name=name, guides={} if name == "base" else {"g": 1.0}),
            answers=[
                Answer(text=text, num_tokens=3, finish_reason="stop", kl=0.0, bad=False)
                for text in texts
            ],
            seconds=1.0,
            num_forwards=9,
        )
        for name, texts in answers.items()
    ]
    about = About(title="", base="b", guides={}, prompts_from="", reward="", config={})
    save_report(summarise(every, prompts, about=about), folder)


@pytest.fixture
def load(tmp_path: Path, endpoint: Endpoint) -> Callable[..., JudgeConfig]:
    """Two reports on the same prompts: the guided answers have more words, but for one."""
    poor = [f"answer {number}" for number in range(NUM)]
    good = [f"{text} with more words\n\nHuman: thanks | a" for text in poor[:-1]] + ["no"]
    write_report(tmp_path / "report", {"base": poor, "guided": good}, PROMPTS)
    write_report(tmp_path / "other", {"base": poor, "guided": ["yes of course"] * NUM}, PROMPTS)
    (tmp_path / "template.txt").write_text("{question}|{first}|{second}")
    path = tmp_path / "judge.yaml"
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    path.write_text(CONFIG.format(root=tmp_path, url=url))

    def load(*overrides: str) -> JudgeConfig:
        return configs.load(JudgeConfig, path, overrides)

    return load


def test_each_pair_of_answers_is_asked_in_both_orders_and_counted_by_prompt(
    load: Callable[..., JudgeConfig], endpoint: Endpoint, tmp_path: Path
):
    judged = judge(load("endpoint.request={max_tokens: 5}"))
    first = f"{PROMPTS[0]}|answer 0 with more words|answer 0"
    second = f"{PROMPTS[0]}|answer 0|answer 0 with more words"
    assert {first, second} <= set(endpoint.asked), "cut before the model speaks for the user"
    assert len(endpoint.asked) == len(set(endpoint.asked)) == 2 * NUM
    verdict = judged.verdicts["good vs poor"]
    found = verdict.comparison
    assert (found.wins, found.ties, found.losses) == (NUM - 1, 0, 1)
    assert (verdict.score, verdict.first_rate) == (pytest.approx((5 * 6 + 2) / 6, abs=1e-6), 0.5)
    assert (judged.prompt_tokens, judged.completion_tokens) == (7 * 2 * NUM, 3 * 2 * NUM)
    assert all(body["max_tokens"] == 5 and body["model"] == "a-judge" for body in endpoint.bodies)
    saved = json.loads((tmp_path / "judged" / "judge.json").read_text())
    assert Judged.model_validate(saved) == judged
    lines = (tmp_path / "judged" / "verdicts.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["scores"] == [[2, 3], [3, 2]]


def test_no_more_requests_are_under_way_than_allowed(
    load: Callable[..., JudgeConfig], endpoint: Endpoint
):
    def slowly(first: str, second: str) -> str:
        time.sleep(0.05)
        return by_words(first, second)

    endpoint.reply = slowly
    judge(load())
    assert endpoint.most_at_once == 3


def test_an_endpoint_that_is_busy_or_broken_for_a_while_changes_nothing(
    load: Callable[..., JudgeConfig], endpoint: Endpoint
):
    want = judge(load())
    seen: Counter[tuple[str, str]] = Counter()

    def reply(first: str, second: str) -> str | int:
        seen[first, second] += 1
        refusals = [429, 503, 500]
        at = seen[first, second] - 1
        return refusals[at] if at < len(refusals) else by_words(first, second)

    endpoint.reply = reply
    found = judge(load("output=${root}/again"))
    assert set(seen.values()) == {4}
    assert found.verdicts == want.verdicts
    assert found.prompt_tokens == want.prompt_tokens


def test_replies_without_scores_are_errors_and_no_ties(
    load: Callable[..., JudgeConfig], endpoint: Endpoint
):
    def reply(first: str, second: str) -> str:
        return "as a language model" if first == "answer 0" else by_words(first, second)

    endpoint.reply = reply
    verdict = judge(load()).verdicts["good vs poor"]
    assert (verdict.num_errors, verdict.num_left_out) == (1, 1)
    assert (verdict.comparison.wins, verdict.comparison.ties) == (NUM - 2, 0)


def test_a_refusal_for_good_ends_the_job_and_says_how_to_go_on(
    load: Callable[..., JudgeConfig], endpoint: Endpoint, tmp_path: Path
):
    answered: list[str] = []

    def reply(first: str, second: str) -> str | int:
        if len(answered) == 4:
            return 401
        answered.append(first)
        return by_words(first, second)

    endpoint.reply = reply
    with pytest.raises(EndpointError, match=r"not now.* 4 of 12 replies are kept; run this again"):
        judge(load("endpoint.max_concurrent=1"))
    assert len(endpoint.asked) == 5
    endpoint.reply = by_words
    judge(load())
    assert len(endpoint.asked) == 5 + 2 * NUM - 4


def test_an_answer_that_is_no_completion_is_refused(
    load: Callable[..., JudgeConfig], endpoint: Endpoint, caplog: pytest.LogCaptureFixture
):
    endpoint.reply = lambda first, second: 200
    path = load().root + "/judge.yaml"
    assert main([path]) == 1
    assert "an answer without choices" in caplog.text


def test_a_killed_run_goes_on_and_pays_nothing_twice(
    load: Callable[..., JudgeConfig], endpoint: Endpoint, tmp_path: Path
):
    want = judge(load("output=${root}/whole"))
    endpoint.asked.clear()
    reached = threading.Event()

    def reply(first: str, second: str) -> str:
        if len(endpoint.asked) == 8:
            reached.set()
            time.sleep(0.3)  # longer than the job lives
        return by_words(first, second)

    endpoint.reply = reply
    process = multiprocessing.get_context("fork").Process(
        target=judge, args=(load("endpoint.max_concurrent=1"),)
    )
    process.start()
    assert reached.wait(30)
    process.kill()
    process.join()
    assert len((tmp_path / "judged" / "replies.jsonl").read_text().splitlines()) == 7
    assert not (tmp_path / "judged" / "judge.json").exists()
    endpoint.reply = by_words
    found = judge(load())
    assert found.verdicts == want.verdicts
    asked = Counter(endpoint.asked)
    assert sorted(asked.values()) == [1] * 11 + [2], "again is asked what had no answer yet"


def test_a_reply_whose_line_was_cut_short_is_asked_for_again(
    load: Callable[..., JudgeConfig], endpoint: Endpoint, tmp_path: Path
):
    want = judge(load())
    path = tmp_path / "judged" / "replies.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    endpoint.asked.clear()
    assert judge(load()) == want
    assert len(endpoint.asked) == 1
    endpoint.asked.clear()
    assert judge(load()) == want
    assert not endpoint.asked


def test_another_pair_or_more_prompts_ask_only_what_is_new(
    load: Callable[..., JudgeConfig], endpoint: Endpoint
):
    judge(load("num=4"))
    assert len(endpoint.asked) == 8
    judge(load())
    assert len(endpoint.asked) == 2 * NUM
    judge(load("pairs=[[poor, good], [other, good]]"))
    assert len(endpoint.asked) == 4 * NUM, "the first of these pairs is known, the other way round"


def test_answers_to_other_prompts_are_refused(load: Callable[..., JudgeConfig], tmp_path: Path):
    write_report(tmp_path / "other", {"base": ["a"] * 2, "guided": ["b"] * 2}, PROMPTS[:2])
    with pytest.raises(DataError, match="answers other prompts"):
        judge(load("pairs=[[good, other]]"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("contestants.good.setting=guide", "has 'base', 'guided'"),
        ("pairs=[[good, bad]]", "'bad', which is no contestant"),
        ("pairs=[[good, poor], [poor, good]]", "each other twice"),
        ("pairs=[[good, good]]", "with themselves"),
        ("template=hhh", "none of hh"),
        ("endpoint.api_key_env=NO_SUCH_KEY", "Set it to the key"),
        ("endpoint.modl=x", "did you mean 'model'"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_asked(
    load: Callable[..., JudgeConfig], endpoint: Endpoint, override: str, message: str
):
    with pytest.raises(ConfigError, match=message):
        judge(load(override))
    assert not endpoint.asked
