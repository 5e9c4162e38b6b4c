"""A server that speaks as much of vLLM's protocol as the sampler needs, over a model of this library.

    python fake_vllm.py serve FOLDER --host 127.0.0.1 --port 8000

FAKE_VLLM in its environment makes it faulty: "stale" never reloads, "mute" tells no token ids, "dead" ends at once.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from posttrain.layout import Layout
from posttrain.models.load import load
from posttrain.samplers import NativeSampler
from posttrain.types import Sample, Sampling


class Engine:
    """The model that is served, and what was asked of it."""

    def __init__(self, folder: str, fault: str = "") -> None:
        self.folder, self.fault, self.lock = folder, fault, threading.Lock()
        self.asked: list[tuple[str, Any]] = []
        self.load()

    def load(self) -> None:
        self.model, self.tokenizer = load(self.folder)

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        with self.lock:
            self.asked.append((path, body))
            if path == "/health":
                return 200, None
            if path == "/v1/models":
                return 200, {"object": "list", "data": [{"id": self.folder, "root": self.folder}]}
            if path == "/collective_rpc":
                if body["method"] != "reload_weights":
                    return 400, {"error": f"no method {body['method']}"}
                if self.fault != "stale":
                    self.load()
                return 200, {"results": [None]}
            if path == "/reset_prefix_cache":
                return 200, None
            if path == "/v1/completions":
                return (404, {"error": "no such model"}) if body["model"] != self.folder else (200, self.complete(body))
            return 404, {"error": path}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = body["prompt"]
        choice: dict[str, Any] = {"index": 0, "text": ""}
        if body.get("prompt_logprobs"):
            with torch.no_grad():
                logp = self.model.logits(self.model.trunk(Layout.of_rows([tokens])).hidden).log_softmax(-1)
            each = [{str(token): {"logprob": float(logp[i, token])}} for i, token in enumerate(tokens[1:])]
            choice["prompt_logprobs"] = [None, *each]
        sampler = NativeSampler(self.model, self.tokenizer, stop_tokens=tuple(body.get("stop_token_ids", ())))
        greedy = body["temperature"] == 0
        sampling = Sampling(
            temperature=1.0 if greedy else body["temperature"],
            greedy=greedy,
            max_tokens=body["max_tokens"],
            stop=tuple(body.get("stop", ())),
        )
        prompt = Sample(tokens=tokens, origin=[3] * len(tokens), trained=[False] * len(tokens))
        (found,) = sampler.sample([prompt], sampling=sampling, seed=body.get("seed", 0) % 2**31, step=0)
        choice |= {"finish_reason": found.finish, "logprobs": {"token_logprobs": found.logprobs[len(tokens) :]}}
        if body.get("return_token_ids") and self.fault != "mute":
            choice["token_ids"] = found.completion
        return {"object": "text_completion", "choices": [choice]}


def server(engine: Engine, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def reply(self, body: Any) -> None:
            status, found = engine.answer(self.path, body)
            text = b"" if found is None else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.reply(json.loads(text) if text else None)

        def log_message(self, *_: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    fault = os.environ.get("FAKE_VLLM", "")
    if fault == "dead":
        raise SystemExit("no GPU was found")
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("folder")
    parser.add_argument("--port", type=int)
    known, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    server(Engine(known.folder, fault), known.port).serve_forever()
