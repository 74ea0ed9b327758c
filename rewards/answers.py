"""What a completion gives as its answer: ``<answer>...</answer>``, read alike in every text reward.

Tags are found with ``str.rfind`` and ``str.find``: time is linear in the text, whatever it holds.
"""

from __future__ import annotations

OPENING = "<answer>"
CLOSING = "</answer>"


def last_answer(text: str) -> str | None:
    """Content of the last answer block, stripped; None where no ``<answer>`` is opened.

    The block runs from the last ``<answer>`` to the ``</answer>`` after it. Without one it runs to
    the end of the text: a completion cut at its length limit still has its answer. Nested blocks
    give the innermost last one; tags are lower case without attributes, as prompts ask for them.
    """
    start = text.rfind(OPENING)
    if start < 0:
        return None
    start += len(OPENING)
    end = text.find(CLOSING, start)
    return text[start : end if end >= 0 else len(text)].strip()
