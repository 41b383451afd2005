"""A model behind an OpenAI-compatible endpoint: one request per reply, paced, retried, and never paid twice.

Every reply is appended to a log before it counts; a run that was killed reads the log and asks for the rest. Neither
address nor key is written anywhere: they come from the environment and go into requests alone.
"""

import fcntl
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.architecture import Frozen
from pipeline.errors import DataError, StageError, UserError
from pipeline.fingerprint import fingerprint

_MAX_ATTEMPTS = 6
_FIRST_WAIT_S = 1.0
_MAX_WAIT_S = 60.0
_RETRIED_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Reply(Frozen):
    """One reply: its text with the thought in think tags, and what the server counted; `key` names its request."""

    key: str
    text: str
    is_complete: bool
    num_prompt_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pacing:
    """How fast an endpoint is asked; changes no reply."""

    requests_per_minute: float | None
    in_flight: int
    timeout_s: float


class Endpoint:
    """The address of one endpoint with its key, read from the environment."""

    def __init__(self, *, url_variable: str, key_variable: str | None) -> None:
        """Raises UserError when a variable is not set or the address is not one that a key may be sent to."""
        self._url = _from_environment(url_variable).rstrip("/")
        self._key = None if key_variable is None else _from_environment(key_variable)
        parts = urllib.parse.urlsplit(self._url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"${url_variable} is no http or https address; wanted one like http://127.0.0.1:8000/v1")
        if self._key is not None and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise UserError(
                f"${url_variable} is plain http to another machine, and a key would be readable on the way: use https, "
                "or a tunnel to 127.0.0.1"
            )
        # No redirects: they would carry the key to wherever the server points. No proxy for this machine itself.
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if parts.hostname in _LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> Any:
        """Return the JSON that the endpoint answers with.

        Raises:
            urllib.error.URLError, OSError, http.client.HTTPException, ValueError: as the standard library does.
        """
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url + path, data=json.dumps(body).encode(), headers=headers)
        with self._opener.open(request, timeout=timeout_s) as answer:
            return json.loads(answer.read())

    def redacted(self, text: str) -> str:
        """Return a text of the server's without the key."""
        return text if self._key is None else text.replace(self._key, "[key]")


def ask_all(
    endpoint: Endpoint,
    bodies: Sequence[Mapping[str, Any]],
    *,
    pacing: Pacing,
    log_path: Path,
    on_reply: Callable[[int], None],
) -> list[Reply]:
    """Return the reply to every chat-completion request, in order; those in the log are not asked for again.

    `on_reply` is told how many there are so far.

    Raises:
        StageError: when the endpoint refuses a request, or keeps failing; what was answered is in the log.
    """
    keys = [fingerprint(dict(body)) for body in bodies]
    pace = _Pace(pacing.requests_per_minute)
    lock, stop = threading.Lock(), threading.Event()
    log_path.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Reply] = {}

    def ask(key: str, body: Mapping[str, Any], log: IO[str]) -> None:
        if stop.is_set():
            return
        try:
            reply = _ask(endpoint, key, body, pace=pace, timeout_s=pacing.timeout_s, stop=stop)
        except BaseException:
            stop.set()
            raise
        with lock:
            log.write(reply.model_dump_json() + "\n")
            log.flush()
            known[key] = reply
            on_reply(len(known))

    with log_path.open("a", encoding="utf-8") as log, ThreadPoolExecutor(max_workers=pacing.in_flight) as pool:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise StageError(f"{log_path} is being written by another run: wait for it to end") from err
        known |= _read_log(log_path)
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in known}
        try:
            futures = [pool.submit(ask, key, body, log) for key, body in missing.items()]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return [known[key] for key in keys]


def _ask(
    endpoint: Endpoint, key: str, body: Mapping[str, Any], *, pace: "_Pace", timeout_s: float, stop: threading.Event
) -> Reply:
    attempt = 0
    while True:
        attempt += 1
        pace.wait(stop)
        wait_s = min(_MAX_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1))
        try:
            return _reply(key, endpoint.post("/chat/completions", body, timeout_s=timeout_s))
        except urllib.error.HTTPError as err:
            said = endpoint.redacted(err.read(400).decode("utf-8", "replace"))
            failure = f"status {err.code}: {said}"
            if err.code not in _RETRIED_STATUS:
                raise StageError(f"the endpoint of {body['model']} refused a request with {failure}") from None
            asked = err.headers.get("Retry-After", "")
            wait_s = max(wait_s, min(_MAX_WAIT_S, float(asked))) if asked.isdigit() else wait_s
        except (OSError, http.client.HTTPException, ValueError) as err:
            failure = endpoint.redacted(f"{type(err).__name__}: {err}")
        if attempt == _MAX_ATTEMPTS or stop.wait(wait_s):
            raise StageError(
                f"the endpoint of {body['model']} failed {attempt} times, last with {failure}. What was answered is "
                "kept: run again when it is up"
            )


def _reply(key: str, answer: Any) -> Reply:
    """Read one chat completion, the thought in tags wherever the server put it.

    Reasoning parsers move the thought into a field of its own; templates that open it in the prompt leave the opening
    tag out of the reply.
    """
    try:
        choice = answer["choices"][0]
        message, usage = choice["message"], answer.get("usage") or {}
        text = message.get("content") or ""
        thought = message.get("reasoning_content") or message.get("reasoning")
    except (KeyError, IndexError, TypeError, AttributeError) as err:
        raise ValueError(f"not a chat completion: {type(err).__name__}") from err
    if thought:
        text = f"<think>\n{thought.strip()}\n</think>\n\n{text.strip()}"
    elif "</think>" in text and "<think>" not in text:
        text = f"<think>\n{text.lstrip()}"
    return Reply(
        key=key,
        text=text.encode("utf-8", "replace").decode("utf-8"),
        is_complete=choice.get("finish_reason") == "stop",
        num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
        num_completion_tokens=int(usage.get("completion_tokens") or 0),
    )


def _read_log(path: Path) -> dict[str, Reply]:
    """Return the replies of a log; a last line that a kill cut is taken off, so that the next one fits."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        os.truncate(path, len(whole))
    found = [Reply.model_validate_json(line) for line in whole.decode("utf-8").split("\n") if line]
    return {reply.key: reply for reply in found}


def _from_environment(variable: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise DataError(f"environment variable {variable} is not set, which the recipe names for an endpoint: set it")
    return value


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object, **__: object) -> None:
        return None


class _Pace:
    """Lets requests start no faster than so many a minute, over all threads."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self._interval_s = 0.0 if requests_per_minute is None else 60.0 / requests_per_minute
        self._next_s = time.monotonic()
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        with self._lock:
            now = time.monotonic()
            start, self._next_s = max(now, self._next_s), max(now, self._next_s) + self._interval_s
        stop.wait(start - now)
