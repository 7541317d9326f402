"""The ways in which a secret may come back from an endpoint that repeats what it was sent. Pure."""

from __future__ import annotations

import base64
import binascii
import html
import json
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

#: bytes: anything shorter is found in texts that have nothing to do with it. The secret itself is looked for always.
FORM_MIN = 8


def forms_of(value: str, whole: str) -> tuple[bytes, ...]:
    """What stands for a secret, the longest first, so that nobody is left with the end of one.

    `value` is the bare secret and `whole` the header's value with it. Each as it is, percent-encoded, escaped for JSON
    and HTML, in base64 (of both alphabets, with and without padding), and within the base64 of a longer text. Of a
    secret for Basic authentication also what it decodes to.
    """
    texts = [value, whole, *_decoded(value)]
    found = {form for text in texts for form in (*_escaped(text), *_encoded(text.encode()))}
    found = {form for form in found if len(form) >= FORM_MIN} | {value.encode()}
    return tuple(sorted(found, key=lambda form: (-len(form), form)))


def _escaped(text: str) -> Iterator[bytes]:
    plain = json.dumps(text)[1:-1]
    percent = quote(text, safe="")
    low = "".join(quote(letter, safe="").lower() if letter != quote(letter, safe="") else letter for letter in text)
    angled = plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    for form in (text, plain, plain.replace("/", "\\/"), angled, percent, low, quote(text), quote_plus(text)):
        yield form.encode()
    yield html.escape(text).encode()


def _encoded(data: bytes) -> Iterator[bytes]:
    for alphabet in (base64.b64encode, base64.urlsafe_b64encode):
        coded = alphabet(data)
        yield coded
        yield coded.rstrip(b"=")
        for before in range(3):
            # the letters that are of these bytes alone, when so many others precede them
            inner = alphabet(bytes(before) + data)
            end = (before + len(data)) * 8 // 6
            yield inner[-(-before * 8 // 6) : end]


def _decoded(value: str) -> Iterator[str]:
    """`user:password`, and the password, when that is what the base64 holds."""
    try:
        text = base64.b64decode(value, validate=True).decode()
    except (binascii.Error, ValueError):
        return
    if ":" in text and text.isprintable():
        yield text
        yield text.partition(":")[2]
