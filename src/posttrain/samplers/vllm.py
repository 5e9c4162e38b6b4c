"""vLLM as the sampler: a server in a process of its own, given every new version of the weights and checked after it.

```
model --save, version.json--> RUN/vllm/weights --reload--> server <--one request an answer-- sample()
                                                     |
                     canary: log-probabilities of a prompt, there and here, must agree
```

The protocol is vLLM's OpenAI-compatible one with token ids in and out, and of its development endpoints `/collective_rpc`
(`reload_weights`) and `/reset_prefix_cache`.  A draw is seeded by `(seed, step, index)`; unlike the native sampler's, it may
change with the batch that the server happens to form.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.errors import ConfigError, SamplerError
from posttrain.files import atomic_folder
from posttrain.layout import Layout
from posttrain.samplers.answer import extended, refuse_empty, room_behind
from posttrain.samplers.draw import check
from posttrain.types import Sample, Sampling

if TYPE_CHECKING:
    from posttrain.models.model import LanguageModel

ARGUMENTS = ("--logprobs-mode", "processed_logprobs", "--enable-prefix-caching", "--generation-config", "vllm")
"""Log-probabilities at the temperature of the draw, one prefill for prompts that are alike, and no defaults of the model's."""
PLAIN = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""What a request must say, since the model's own settings would fill it in."""
MOVED = 0.01
"""Nats that a canary must have moved here before an answer that did not move there is held against the server."""
CANARY = 32
"""Tokens whose log-probabilities are compared after every change of weights."""
TAIL = 1500
"""Characters of the server's log that an error shows."""

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the environment's is not for this


@dataclass
class Server:
    """A vLLM server: one that runs already, or one of our own over a folder of weights."""

    folder: Path
    """Weights that it serves, and beside them its log."""
    url: str = ""
    """Of a server that runs already; empty: one is started."""
    deadline: float = 900.0
    """Seconds until it must answer."""
    process: subprocess.Popen[bytes] | None = None
    name: str = ""
    """What it calls the model."""

    @property
    def log(self) -> Path:
        """What our own server prints."""
        return self.folder.parent / "server.log"

    def start(self) -> None:
        """Start it where it is ours, and wait until it is well.

        Raises:
            ConfigError: There is no `vllm` on this machine, or the server serves another folder.
            SamplerError: It did not come up.
        """
        if not self.url:
            program = shutil.which("vllm")
            if program is None:
                raise ConfigError("sampler 'vllm' needs the program `vllm`: pip install vllm, or leave sampler=native")
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            command = [program, "serve", str(self.folder), "--host", "127.0.0.1", "--port", str(port), *ARGUMENTS]
            environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
        self._wait()
        told = self.ask("/v1/models")["data"][0]
        self.name, served = str(told["id"]), str(told.get("root") or "")
        if Path(served).resolve() != self.folder.resolve():
            line = f"VLLM_SERVER_DEV_MODE=1 vllm serve {self.folder} {' '.join(ARGUMENTS)}"
            raise ConfigError(f"the server at {self.url} serves '{served}', not this run's weights; start it as: {line}")

    def _wait(self) -> None:
        until = time.monotonic() + self.deadline
        while time.monotonic() < until:
            if self.process is not None and self.process.poll() is not None:
                raise SamplerError(f"the vLLM server ended with status {self.process.returncode}{self.last_words()}")
            with contextlib.suppress(OSError, HTTPException), _DIRECT.open(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.2)
        raise SamplerError(f"the vLLM server at {self.url} did not answer within {self.deadline:.0f} s{self.last_words()}")

    def last_words(self) -> str:
        """The end of its log, where it is ours."""
        if not self.log.exists():
            return ""
        return f"; the end of {self.log}:\n{self.log.read_text(encoding='utf-8', errors='replace')[-TAIL:]}"

    def ask(self, path: str, body: dict[str, Any] | None = None, *, tries: int = 3) -> Any:
        """One request, JSON both ways; a connection that breaks is tried again.

        Raises:
            SamplerError: The server refused, or could not be reached.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers={"Content-Type": "application/json"})
        for number in range(tries):
            try:
                with _DIRECT.open(request, timeout=self.deadline) as response:
                    text = response.read()
                return json.loads(text) if text.strip() else {}
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:500]
                raise SamplerError(f"the vLLM server answered {path} with {error.code}: {said}") from None
            except (OSError, HTTPException) as error:
                if number == tries - 1 or (self.process is not None and self.process.poll() is not None):
                    raise SamplerError(f"the vLLM server cannot be reached at {path}: {error}{self.last_words()}") from None
                time.sleep(0.5 * 2**number)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End our own server, with everything that it started."""
        if self.process is None or self.process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class VllmSampler:
    """Writes answers with a vLLM server that serves the newest weights; see `types.Sampler`.

    The server starts, and gets its weights, when the first answer is asked for; a new `policy_version` is sent before the
    next answer.  Close it, or use it as a context.
    """

    model: LanguageModel
    tokenizer: Any
    folder: Path
    """A folder of the run's own for weights, version and log."""
    stop_tokens: tuple[int, ...] = field(kw_only=True)
    """Tokens that end an answer; they are kept, and trained."""
    url: str = field(default="", kw_only=True)
    """A server that runs already over `folder`/weights; empty: one is started."""
    concurrent: int = field(default=256, kw_only=True)
    """Requests at a time."""
    tolerance: float = field(default=0.1, kw_only=True)
    """Nats by which a canary's mean log-probability may differ there and here."""
    policy_version: int = field(default=0, kw_only=True)
    """Written into every sample; set by the run after every update."""
    progress: Callable[[int, int], None] | None = field(default=None, kw_only=True)
    """Called with (answers that are done, all answers) whenever one ends."""

    def __post_init__(self) -> None:
        if self.model.has_adapters:
            raise ConfigError("sampler 'vllm' gets whole weights, and this model trains adapters; leave sampler=native")
        self.context: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.served: int | None = None
        self.server: Server | None = None
        self.canary: list[int] = []
        self.told: tuple[list[float], list[float]] | None = None  # of the canary at the last version: there, here

    def __enter__(self) -> VllmSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server, where it is ours."""
        if self.server is not None:
            self.server.close()
            self.server = self.served = self.told = None

    # ------------------------------------------------------------------------------------------ weights

    @property
    def weights(self) -> Path:
        """The folder that the server reads."""
        return Path(self.folder) / "weights"

    def _write(self) -> None:
        from posttrain.models.load import save

        record = {"version": self.policy_version, "sha256": self.model.fingerprint()}
        with atomic_folder(self.weights) as partial:
            save(self.model, self.tokenizer, partial)
            (partial / "version.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

    def refresh(self, canary: Sequence[int]) -> None:
        """Let the server have the weights of `policy_version`, and make sure that it does.

        Raises:
            SamplerError: It computes something else than the trainer.
        """
        if self.served == self.policy_version:
            return
        self._write()
        fresh = self.server is None and not self.url  # a server of our own that begins now reads them now
        self.server = self.server or self._started()
        if not fresh:
            self.server.ask("/collective_rpc", {"method": "reload_weights"})
            self.server.ask("/reset_prefix_cache", {})
        if len(self.canary) < 2:
            self.canary = list(canary)[:CANARY]
        self._compare(self.canary)
        self.served = self.policy_version

    def _started(self) -> Server:
        server = Server(self.weights, self.url)
        try:
            server.start()
        except BaseException:
            server.close()
            raise
        return server

    def _compare(self, tokens: list[int]) -> None:
        if len(tokens) < 2:
            return
        assert self.server is not None
        asked = {"prompt": tokens, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
        told = self._choice(self.server.ask("/v1/completions", self._named(asked))).get("prompt_logprobs") or []
        try:
            theirs = [float(told[place][str(tokens[place])]["logprob"]) for place in range(1, len(tokens))]
        except (IndexError, KeyError, TypeError):
            raise SamplerError("the vLLM server told no log-probabilities of a prompt; it is too old, or not vLLM") from None
        with torch.no_grad():
            here = Layout.of_rows([tokens], device=self.model.device)
            logp = self.model.logits(self.model.trunk(here).hidden).log_softmax(-1)
        ours = [float(logp[place - 1, tokens[place]]) for place in range(1, len(tokens))]
        before, self.told = self.told, (theirs, ours)
        if before is not None and before[0] == theirs and max(abs(a - b) for a, b in zip(before[1], ours, strict=True)) > MOVED:
            raise SamplerError(f"version {self.policy_version} was sent, and the vLLM server still answers with the one before")
        gap = abs(sum(theirs) - sum(ours)) / len(ours)
        if not gap <= self.tolerance:
            raise SamplerError(
                f"after version {self.policy_version} was sent, the vLLM server differs from the trainer by {gap:.3g} nats a "
                f"token (at most {self.tolerance} are allowed): it has other weights, or reads this model differently"
            )

    # ------------------------------------------------------------------------------------------ answers

    def sample(
        self,
        prompts: Sequence[Sample],
        *,
        sampling: Sampling,
        seed: int,
        step: int,
        done: Callable[[Sample], None] | None = None,
    ) -> list[Sample]:
        """Continue every prompt once, in order; see `types.Sampler`.

        A prompt that leaves no room in the context comes back as it is, with finish "length".

        Raises:
            ConfigError: `sampling` truncates: vLLM does not tell log-probabilities before truncation.
            DataError: A prompt is empty.
            SamplerError: The server failed, or its weights are not the trainer's.
        """
        check(sampling)
        if sampling.truncated and not sampling.greedy:
            raise ConfigError("top_p and top_k need sampler=native: vLLM tells no log-probabilities before truncation")
        refuse_empty(prompts)
        if not prompts:
            return []
        self.refresh(prompts[0].tokens)
        answers: dict[int, Sample] = {}  # by the number of the prompt
        with ThreadPoolExecutor(min(self.concurrent, len(prompts))) as pool:
            asked = {pool.submit(self._answer, prompt, sampling, seed, step): n for n, prompt in enumerate(prompts)}
            try:
                for future in as_completed(asked):
                    answer = answers[asked[future]] = future.result()
                    if done is not None:
                        done(answer)
                    if self.progress is not None:
                        self.progress(len(answers), len(prompts))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after a failure the others are not asked for
        return [answers[number] for number in range(len(prompts))]

    def _answer(self, prompt: Sample, sampling: Sampling, seed: int, step: int) -> Sample:
        room = room_behind(len(prompt.tokens), max_tokens=sampling.max_tokens, context=self.context)
        temperature = 1.0 if sampling.greedy else sampling.temperature
        about = {"temperature": temperature, "policy_version": self.policy_version}
        if room < 1:
            return extended(prompt, [], logprobs=[], sampled_logprobs=[], finish="length", **about)  # type: ignore[arg-type]
        assert self.server is not None
        choice = self._choice(self.server.ask("/v1/completions", self._request(prompt, sampling, room, seed, step)))
        tokens, told = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(tokens, list) or not isinstance(told, list) or len(tokens) != len(told):
            raise SamplerError("the vLLM server told no token ids with log-probabilities; it must know `return_token_ids`")
        logprobs = [float(value) for value in told]
        sampled = [0.0] * len(tokens) if sampling.greedy else logprobs
        finish = "length" if choice.get("finish_reason") == "length" else "stop"
        return extended(prompt, tokens, logprobs=logprobs, sampled_logprobs=sampled, finish=finish, **about)  # type: ignore[arg-type]

    def _request(self, prompt: Sample, sampling: Sampling, room: int, seed: int, step: int) -> dict[str, Any]:
        key = hashlib.sha256(f"{seed} {step} {prompt.index}".encode()).digest()
        return self._named(
            {
                "prompt": list(prompt.tokens),
                "max_tokens": room,
                "temperature": 0.0 if sampling.greedy else sampling.temperature,
                **PLAIN,
                "seed": int.from_bytes(key[:8], "big") >> 1,
                "logprobs": 1,
                "return_token_ids": True,
                "skip_special_tokens": False,
                "ignore_eos": True,  # the run's own end tokens decide
                "stop_token_ids": list(self.stop_tokens),
                "stop": list(sampling.stop),
                "include_stop_str_in_output": True,
            }
        )

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        assert self.server is not None
        return {"model": self.server.name, **body}

    @staticmethod
    def _choice(answer: Any) -> dict[str, Any]:
        try:
            found: dict[str, Any] = answer["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise SamplerError(f"the vLLM server answered without choices: {str(answer)[:300]}") from None
        return found


__all__ = ["Server", "VllmSampler"]
