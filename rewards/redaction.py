"""Texts from elsewhere without a secret in them."""

from __future__ import annotations

import base64
import html
import json
from urllib.parse import quote

INSTEAD = "***"


def hidden(text: str, secret: str) -> str:
    """``text`` without ``secret``, also as HTML, JSON, an address or credentials write it."""
    forms = {
        secret,
        html.escape(secret),
        json.dumps(secret)[1:-1],
        quote(secret, safe=""),
        base64.b64encode(secret.encode()).decode(),
    }
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, INSTEAD)
    return text
