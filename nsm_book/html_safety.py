"""HTML that a run left, read as a browser reads it: whether any of it runs."""

import html
import re

# HTML in which every < begins a tag or a comment that is read here as a browser reads it: it can hide none.
VALUE = r"""(?:\s*=\s*(?:"[^"<]*"|'[^'<]*'))?"""
TOKEN = re.compile(rf"[^<]+|<!--[^<>]*-->|<(/?[a-z][\w:-]*)((?:\s+[\w:.-]+{VALUE})*)\s*/?>", re.IGNORECASE | re.ASCII)
ATTRIBUTE = re.compile(rf"\s+([\w:.-]+)({VALUE})", re.ASCII)
SCRIPT_URL = re.compile(r"(?:javascript|vbscript|data(?!:image/(?:png|jpeg|gif)[;,])):", re.IGNORECASE)
ACTIVE = {  # elements that run code, load it, or put it in later
    *("script", "iframe", "frame", "object", "embed", "applet", "base", "meta", "link", "form", "portal"),
    *("set", "animate", "animatemotion", "animatetransform"),
}


def find_script(text: str) -> str | None:
    """The first piece of some HTML that may run code in a reader's browser, or is not plainly written; None without one.

    Data are no code: a `script` of the type application/json, as the book's figures have it, is none that runs.
    """
    place = 0
    while place < len(text):
        token = TOKEN.match(text, place)
        if token is None:
            return text[place : place + 60]
        if _is_active(token):
            return token[0]
        place = token.end()
    return None


def _is_active(token: re.Match[str]) -> bool:
    tag = (token[1] or "").lower()
    given: dict[str, str] = {}
    for name, value in ATTRIBUTE.findall(token[2] or ""):
        given.setdefault(name.lower(), html.unescape(value.lstrip("= \t\r\n\f\v")[1:-1]))  # of two, a browser takes the first
    data = tag == "script" and given.get("type") == "application/json"
    return (tag in ACTIVE and not data) or any(_runs(name, value) for name, value in given.items())


def _runs(name: str, value: str) -> bool:
    """Whether an attribute holds code, or the address of some."""
    if name.startswith(("aria-", "data-")) or name in ("alt", "title"):
        return False  # these are only words
    return name.startswith("on") or name == "srcdoc" or bool(SCRIPT_URL.match(re.sub(r"[\x00-\x20]", "", value)))
