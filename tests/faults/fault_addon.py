"""Injects faults into HTTP that passes through mitmproxy, by rules and by a seed: `mitmdump -s` loads this file.

It runs in mitmproxy's own environment and imports nothing of the project. The rules are read anew whenever their file
is replaced. Whether a rule strikes follows from the seed, the request and how often it was made, and so not from the
order in which concurrent requests happen to arrive. Each fault is written down as a line of JSON.
"""

import asyncio
import json
import random
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mitmproxy import ctx, http
from mitmproxy.addonmanager import Loader

REFUSALS = {  # kind: HTTP status and code of the answer that takes the server's place
    "internal_error": (500, "InternalError"),
    "slow_down": (503, "SlowDown"),
    "too_many_requests": (429, "TooManyRequests"),
    "expired_token": (403, "ExpiredToken"),
    "clock_skew": (403, "RequestTimeTooSkewed"),
    "access_denied": (403, "AccessDenied"),
}


class Faults:
    """The addon. A rule is struck once a request; the first rule that strikes is the one that counts."""

    def __init__(self) -> None:
        self._rules: list[dict[str, Any]] = []
        self._version = (0, 0)
        self._seen: Counter[tuple[str, str]] = Counter()  # requests by method and path
        self._matched: Counter[int] = Counter()  # by rule
        self._struck: Counter[int] = Counter()
        self._aborting: set[asyncio.Task[None]] = set()

    def load(self, loader: Loader) -> None:
        loader.add_option("fault_folder", str, "", "Folder of rules.json, of faults.jsonl and of the port's file")
        loader.add_option("fault_seed", int, 0, "Seed of what is left to chance")

    def running(self) -> None:
        (_, port, *_), *_ = ctx.master.addons.get("proxyserver").listen_addrs()
        partial = self._folder / "port.partial"
        partial.write_text(str(port))
        partial.replace(self._folder / "port")

    async def request(self, flow: http.HTTPFlow) -> None:
        """Choose the fault; see to those that strike before the server has the request."""
        self._read_rules()
        self._seen[flow.request.method, flow.request.path] += 1
        rule = self._choose(flow)
        if rule is None:
            return
        kind = rule["kind"]
        if kind in REFUSALS:
            flow.response = refuse(flow, *REFUSALS[kind])
        elif kind == "reset_before":
            self._reset(flow)
            flow.kill()
        elif kind == "flip_upload":
            flow.request.raw_content = flip_byte(flow.request.raw_content or b"", self._chance(flow, "byte"))
        elif kind in ("latency", "stall"):
            self._write_down(flow, kind)  # now, for whoever waits for it
            await asyncio.sleep(rule["seconds"])
            if kind == "stall" and flow.killable:
                flow.kill()
            return
        else:
            flow.metadata["fault"] = kind
            return
        self._write_down(flow, kind)

    def response(self, flow: http.HTTPFlow) -> None:
        """See to the faults that strike after the server has done what it was asked."""
        kind, content = flow.metadata.get("fault"), flow.response.raw_content or b""
        if kind == "reset_after":
            self._reset(flow)
            flow.kill()
        elif kind == "flip_answer" and content and "ETag" in flow.response.headers:  # nothing protects a listing
            flow.response.raw_content = flip_byte(content, self._chance(flow, "byte"))
        elif kind in ("truncated", "reset_within") and content and flow.request.method != "HEAD":
            flow.response.data.content = content[: len(content) // 2]  # and Content-Length stays as it was
            flow.response.headers["Connection"] = "close"
            if kind == "reset_within":
                self._reset(flow, delay_s=0.05)
        else:
            return
        self._write_down(flow, kind)

    @property
    def _folder(self) -> Path:
        return Path(ctx.options.fault_folder)

    def _read_rules(self) -> None:
        path = self._folder / "rules.json"
        status = path.stat()
        version = (status.st_mtime_ns, status.st_ino)
        if version != self._version:
            self._rules, self._version = json.loads(path.read_bytes()), version
            self._matched.clear()
            self._struck.clear()

    def _choose(self, flow: http.HTTPFlow) -> dict[str, Any] | None:
        for index, rule in enumerate(self._rules):
            if not re.fullmatch(rule["method"], flow.request.method) or not re.search(rule["path"], flow.request.path):
                continue
            if rule["kind"] == "flip_upload" and not flow.request.raw_content:
                continue
            self._matched[index] += 1
            if self._matched[index] <= rule["after"]:
                continue
            if rule["times"] is not None and self._struck[index] >= rule["times"]:
                continue
            if self._chance(flow, f"rule {index}").random() < rule["probability"]:
                self._struck[index] += 1
                return rule
        return None

    def _chance(self, flow: http.HTTPFlow, purpose: str) -> random.Random:
        request = flow.request
        times = self._seen[request.method, request.path]
        return random.Random(f"{ctx.options.fault_seed} {purpose} {request.method} {request.path} {times}")

    def _reset(self, flow: http.HTTPFlow, *, delay_s: float = 0.0) -> None:
        """Let the client's connection end with RST, where mitmproxy by itself would end it in good order."""
        handler = ctx.master.addons.get("proxyserver").connections[flow.client_conn.id]
        writer = handler.transports[flow.client_conn].writer
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        async def abort(end: Callable[[], None]) -> None:
            await asyncio.sleep(delay_s)
            end()

        if delay_s == 0:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(abort(writer.transport.abort))
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)

    def _write_down(self, flow: http.HTTPFlow, kind: str) -> None:
        entry = {"kind": kind, "method": flow.request.method, "path": flow.request.path, "time_s": time.time()}
        with (self._folder / "faults.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")


def refuse(flow: http.HTTPFlow, status: int, code: str) -> http.Response:
    """Return S3's answer of this code. Its message names the access key, as servers do: nothing may show it."""
    key = re.search(r"Credential=([^/]+)", flow.request.headers.get("Authorization", ""))
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f"<Error><Code>{code}</Code><Message>refused for {key[1] if key else 'nobody'}</Message></Error>"
    )
    content = b"" if flow.request.method == "HEAD" else body.encode()
    return http.Response.make(status, content, {"Content-Type": "application/xml"})


def flip_byte(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


addons = [Faults()]
