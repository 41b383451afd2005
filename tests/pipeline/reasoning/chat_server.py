"""A small OpenAI-compatible server: /v1/chat/completions of a model of transformers, on 127.0.0.1.

Sampling follows the request's seed, so that the same request gets the same reply. It can be told to fail first, and
what to say to a question.
"""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import generation_prompt_ids, stop_token_ids
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM

KEY = "sk-the-secret-of-this-test"


@dataclass
class ChatServer:
    """What the server serves and saw. `failures` are statuses that the next requests get instead of a reply.

    `scripted` holds the message that a model name gives to a question; its own words answer all others.
    """

    model: HeterogeneousLlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    failures: list[int] = field(default_factory=list)
    scripted: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    served: list[dict[str, Any]] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        """The base address that a client is given."""
        return f"http://127.0.0.1:{self.port}/v1"

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the chat completion of one request."""
        message = self.scripted.get((request["model"], request["messages"][-1]["content"]))
        if message is not None:
            return {
                "object": "chat.completion",
                "model": request["model"],
                "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1},
            }
        prompt = generation_prompt_ids(self.tokenizer, request["messages"])
        stop_ids = stop_token_ids(self.tokenizer, self.model.architecture.eos_token_ids)
        with self.lock:
            torch.manual_seed(request["seed"])
            output = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=request["max_tokens"],
                do_sample=request["temperature"] > 0,
                temperature=request["temperature"] or 1.0,
                top_p=request["top_p"],
                top_k=0,
                eos_token_id=list(stop_ids),
                pad_token_id=stop_ids[0],
            )
        assert isinstance(output, torch.Tensor)
        ids: Sequence[int] = output[0, len(prompt) :].tolist()
        has_ended = ids[-1] in stop_ids
        text = self.tokenizer.decode(ids[:-1] if has_ended else ids, skip_special_tokens=True)
        return {
            "object": "chat.completion",
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop" if has_ended else "length",
                }
            ],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)},
        }


@contextmanager
def serve(model: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[ChatServer]:
    """Serve until the context is left."""
    state = ChatServer(model=model, tokenizer=tokenizer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.arrivals_s.append(time.monotonic())
                failure = state.failures.pop(0) if state.failures else None
            if self.path != "/v1/chat/completions":
                failure = 404
            elif self.headers.get("Authorization") != f"Bearer {KEY}":
                failure = 401
            if failure is not None:
                # Some servers quote the key in their errors.
                self._send(failure, {"error": f"refused {self.headers.get('Authorization')}"})
                return
            answer = state.complete(request)
            state.served.append(request)
            self._send(200, answer)

        def _send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status in (301, 302):
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
