"""The vLLM sampler against a fake server that speaks its protocol: tokens, weights by version, faults."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import Engine, server

from posttrain import Optimizer, Run, tiny, train
from posttrain.errors import ConfigError, SamplerError
from posttrain.methods import method
from posttrain.models.load import load, save
from posttrain.samplers.vllm import VllmSampler
from posttrain.tasks import task
from posttrain.types import Origin, Sample, Sampling

torch.set_num_threads(1)
STOP = (2,)


def prompt(*tokens: int, index: int = 0) -> Sample:
    return Sample(tokens=list(tokens), origin=[int(Origin.USER)] * len(tokens), trained=[False] * len(tokens), index=index)


class Served:
    """A fake server over the weights of a sampler's folder."""

    def __init__(self, folder: Path, fault: str = "") -> None:
        self.model, self.tokenizer = load(tiny.path())
        save(self.model, self.tokenizer, folder / "weights")
        self.engine = Engine(str(folder / "weights"), fault)
        self.http = server(self.engine, 0)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self.http.server_port}"
        self.sampler = VllmSampler(self.model, self.tokenizer, folder, stop_tokens=STOP, url=url)

    def asked(self, path: str) -> list[dict]:
        return [body for asked, body in self.engine.asked if asked == path]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = Served(tmp_path)
    yield found
    found.http.shutdown()


def test_answers_have_the_contract_of_a_sampler(served: Served) -> None:
    asked = [prompt(50, 60, 70, index=7), prompt(50, 61, 72, 80, index=3), prompt(50, 60, 70, index=8)]
    served.sampler.policy_version = 4
    found = served.sampler.sample(asked, sampling=Sampling(max_tokens=6), seed=1, step=2)
    for before, after in zip(asked, found, strict=True):
        length = len(before.tokens)
        assert after.tokens[:length] == before.tokens
        assert after.index == before.index
        assert 1 <= len(after.completion) <= 6
        assert after.origin[length:] == [int(Origin.POLICY)] * len(after.completion)
        assert after.trained == [False] * length + [True] * len(after.completion)
        assert len(after.logprobs) == len(after.sampled_logprobs) == len(after.tokens)
        assert all(value < 0 for value in after.logprobs[length:])
        assert after.finish == ("stop" if after.tokens[-1] in STOP else "length")
        assert after.policy_version == 4
    again = served.sampler.sample(asked, sampling=Sampling(max_tokens=6), seed=1, step=2)
    assert [a.tokens for a in again] == [a.tokens for a in found]
    other = served.sampler.sample(asked, sampling=Sampling(max_tokens=6), seed=1, step=3)
    assert [a.tokens for a in other] != [a.tokens for a in found]
    seeds = [body["seed"] for body in served.asked("/v1/completions") if "seed" in body]
    assert len(set(seeds)) == 6
    plain = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}  # the model's own settings must not fill these in
    assert all(plain.items() <= body.items() for body in served.asked("/v1/completions") if "seed" in body)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_every_answer_is_told_when_it_is_there_whatever_its_place(served: Served) -> None:
    """The first prompt is answered only after the second was told: nobody waits for the order of the prompts."""
    told: list[Sample] = []
    real, second = served.sampler._answer, threading.Event()

    def answer(asked: Sample, *rest: Any) -> Sample:
        if asked.index == 0:
            assert second.wait(30)
        return real(asked, *rest)

    def done(sample: Sample) -> None:
        told.append(sample)
        assert threading.current_thread() is threading.main_thread()
        second.set()

    served.sampler._answer = answer  # type: ignore[method-assign]
    asked = [prompt(50, 60, index=0), prompt(50, 61, index=1)]
    answers = served.sampler.sample(asked, sampling=Sampling(max_tokens=2), seed=0, step=0, done=done)
    assert [sample.index for sample in answers] == [0, 1]
    assert told == [answers[1], answers[0]]


def test_weights_are_sent_once_a_version_and_checked(served: Served) -> None:
    sampler = served.sampler
    sampler.sample([prompt(50, 60)], sampling=Sampling(max_tokens=2), seed=0, step=0)
    sampler.sample([prompt(50, 60)], sampling=Sampling(max_tokens=2), seed=0, step=1)
    assert len(served.asked("/collective_rpc")) == 1
    with torch.no_grad():
        for weight in served.model.parameters().values():
            weight.mul_(0.9)
    sampler.policy_version = 1
    sampler.sample([prompt(50, 60)], sampling=Sampling(max_tokens=2), seed=0, step=2)
    assert len(served.asked("/collective_rpc")) == len(served.asked("/reset_prefix_cache")) == 2
    assert served.engine.model.fingerprint() == served.model.fingerprint()
    assert f'"{served.model.fingerprint()}"' in (sampler.weights / "version.json").read_text()


def test_a_missed_reload_is_found_out_by_what_did_not_move(served: Served) -> None:
    served.sampler.tolerance = 100.0
    served.sampler.sample([prompt(50, 60, 70)], sampling=Sampling(max_tokens=2), seed=0, step=0)
    served.engine.fault = "stale"
    with torch.no_grad():
        for weight in served.model.parameters().values():
            weight.mul_(0.9)
    served.sampler.policy_version = 1
    with pytest.raises(SamplerError, match="the one before"):
        served.sampler.sample([prompt(50, 60, 70)], sampling=Sampling(max_tokens=2), seed=0, step=1)


@pytest.mark.usefixtures("program")
def test_a_proxy_of_the_environment_is_not_for_our_own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert train(run_with(tmp_path / "run", steps=1)).steps == 1


@pytest.mark.parametrize(
    ("fault", "words"), [("stale", "differs from the trainer"), ("mute", "return_token_ids")], ids=["stale", "mute"]
)
def test_a_faulty_server_is_found_out(tmp_path: Path, fault: str, words: str) -> None:
    served = Served(tmp_path, fault)
    with torch.no_grad():
        for weight in served.model.parameters().values():
            weight.mul_(0.8 if fault == "stale" else 1)
    with pytest.raises(SamplerError, match=words):
        served.sampler.sample([prompt(50, 60, 70)], sampling=Sampling(max_tokens=2), seed=0, step=0)
    served.http.shutdown()


def test_what_cannot_be_honoured_is_refused(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="before truncation"):
        served.sampler.sample([prompt(50, 60)], sampling=Sampling(top_p=0.9), seed=0, step=0)
    other = VllmSampler(served.model, served.tokenizer, tmp_path / "b", stop_tokens=STOP, url=served.sampler.url)
    with pytest.raises(ConfigError, match="vllm serve"):
        other.sample([prompt(50, 60)], sampling=Sampling(max_tokens=2), seed=0, step=0)


def test_a_server_that_is_gone_is_an_error_in_words(served: Served) -> None:
    served.sampler.sample([prompt(50, 60)], sampling=Sampling(max_tokens=2), seed=0, step=0)
    served.http.shutdown()
    served.http.server_close()
    with pytest.raises(SamplerError, match="cannot be reached"):
        served.sampler.sample([prompt(50, 60)], sampling=Sampling(max_tokens=2), seed=0, step=0)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `vllm` on the path, which is the fake."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "vllm"
    fake = Path(__file__).parent / "fake_vllm.py"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{fake}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return script


def run_with(out: Path, **settings: object) -> Run:
    problems = task("word-problems", level="demo")
    settings = {"sampler": "vllm", "steps": 2, **settings}
    return Run(
        method=method("grpo")(beta=0.0),
        model="tiny",
        data=problems.rows("train", 4),
        rewards=problems.rewards,
        out=str(out),
        prompts_per_step=2,
        samples_per_prompt=2,
        sampling=Sampling(max_tokens=8),
        optimizer=Optimizer(lr=1e-4),
        quiet=True,
        **settings,
    )


@pytest.mark.usefixtures("program")
def test_a_run_starts_its_server_and_ends_it(tmp_path: Path) -> None:
    found = train(run_with(tmp_path / "run"))
    assert found.steps == 2
    assert (tmp_path / "run" / "vllm" / "weights" / "version.json").exists()
    assert (tmp_path / "run" / "vllm" / "server.log").exists()
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in p.read_bytes()]


@pytest.mark.usefixtures("program")
def test_a_server_that_does_not_come_up_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "dead")
    with pytest.raises(SamplerError, match="no GPU was found"):
        train(run_with(tmp_path / "run"))


def test_unknown_samplers_and_missing_programs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="native, vllm"):
        train(run_with(tmp_path / "a", sampler="vlm"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="pip install vllm"):
        train(run_with(tmp_path / "b"))
