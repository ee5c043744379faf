"""Reads webhooks as an app does with the official Python client.

python client_webhooks.py FILE       with JSON: `secret`, and `posts`, each with `headers` and `body`
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import openai


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    clients = [kind(api_key="unused", webhook_secret=given["secret"]) for kind in (openai.OpenAI, openai.AsyncOpenAI)]
    for client in clients:
        for post in given["posts"]:
            event = client.webhooks.unwrap(post["body"], post["headers"])
            print(event.type, event.data.id)
            try:
                client.webhooks.unwrap(post["body"].replace("evt_", "evt-"), post["headers"])
            except openai.InvalidWebhookSignatureError:
                print("refused")
    clients[0].close()
    asyncio.run(clients[1].close())


main()
