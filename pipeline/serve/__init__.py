"""`so8t serve`: an OpenAI-compatible server that shows the answer and withholds the thinking.

    client -> app (limits, keys, allow-list) -> engine (llama.cpp or upstream) -> guard -> audit log -> client

No text of a generation reaches the client before the guard has judged the whole generation and the audit log has the
verdict on disk. docs/server.md states the nine guarantees and their limits.
"""
