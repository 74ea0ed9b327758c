"""Keys of endpoints: whether one is there, and foreign texts without it."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from urllib.parse import quote

INSTEAD = "***"
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
KEY = re.compile(r"[!-~]+")


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


def wrong_key(variable: str | None) -> str | None:
    """Why field ``api_key_env`` leads to no key; None if it does, or there is none."""
    if variable is None:
        return None
    if not VARIABLE.fullmatch(variable):  # not shown: it may be the key itself
        return (
            "field 'api_key_env' is no NAME of an environment variable (capitals, digits and _); "
            "never put the key itself into a recipe"
        )
    key = os.environ.get(variable, "")
    if not key:
        return (
            f"field 'api_key_env': the environment variable {variable} is not set here; export it"
        )
    if not KEY.fullmatch(key):
        return f"the key in the environment variable {variable} has spaces or is not ASCII"
    return None
