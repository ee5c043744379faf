"""Signatures of what this server sends on its own, as the Standard Webhooks specification has them.

Receivers verify them with `client.webhooks.unwrap` of the official SDK, or by hand: base64 of HMAC-SHA256, with the
secret's bytes, of `{id}.{timestamp}.{body}`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

SECRET_PREFIX = "whsec_"  # noqa: S105
SECRET_BYTES = 32


def new_secret() -> str:
    """`whsec_` and random bytes in base64."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def signed_headers(
    secret: str, message_id: str, timestamp: int, body: bytes, *, old_secret: str | None = None
) -> dict[str, str]:
    """The headers that go with `body`. message_id: the same for every try. timestamp: Unix seconds of this try.
    old_secret: signs as well, for receivers that have not learned the new one yet."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(_signature(one, signed) for one in (secret, old_secret) if one),
    }


def _signature(secret: str, signed: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    return f"v1,{base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()}"
