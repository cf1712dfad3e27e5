"""What the guard's cost is measured against: the same web server and client library, forwarding and nothing else.

Run: python bare_proxy.py UPSTREAM_URL; prints its own URL.
"""

from __future__ import annotations

import json
import sys

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response

from pipeline.serve.start import bind, uvicorn_config

app = FastAPI()
client = httpx.AsyncClient(trust_env=False, timeout=60, limits=httpx.Limits(max_connections=128))


@app.post("/v1/chat/completions")
async def forward(request: Request) -> Response:
    body = {**json.loads(await request.body()), "stream": True}
    parts = []
    async with client.stream("POST", f"{sys.argv[1]}/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                parts.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
    choice = {"index": 0, "message": {"role": "assistant", "content": "".join(parts)}, "finish_reason": "stop"}
    return Response(json.dumps({"object": "chat.completion", "choices": [choice]}), media_type="application/json")


if __name__ == "__main__":
    listener = bind("127.0.0.1", 0)
    print(f"bare at http://127.0.0.1:{listener.getsockname()[1]}/v1, ", flush=True)
    uvicorn.Server(uvicorn_config(app)).run(sockets=[listener])
