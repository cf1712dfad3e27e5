"""`so8t serve`: an OpenAI-compatible server that shows the answer and withholds the thinking.

    client -> app (limits, keys, allow-list) -> engine (llama.cpp or upstream) -> guard -> audit log -> client

Nothing of a generation reaches the client before the guard has judged the whole of it and the audit log holds the
verdict on disk. docs/server.md states the nine guarantees and what is out of their reach.
"""
