"""Secrets kept out of what is written, sent or said: one rule for records, for messages and for libraries' logs.

Masked are the values of names that denote a secret, wherever such a pair stands (a mapping, a command line, a URL's
query, a sentence), and whatever stands before the ``@`` of a URL's host.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_LOCKS = r"pass(?:word|wd|phrase|code)s?|pwd|secrets?|credentials?"
_KEYS = (
    r"(?:access_?|secret_?|private_?|api_?|account_?|auth_?|signing_?)keys?|authorization|signature|sig"
    r"|token|(?:access|auth|api|session|security|bearer|refresh|id)_?tokens"  # ``tokens`` alone are those of a ViT
)
_NAME = re.compile(rf"(?:^|_)(?:{_LOCKS}|{_KEYS})(?:$|_)|(?:password|passwd|secret)", re.IGNORECASE)
_LOCK = re.compile(rf"(?:^|_)(?:{_LOCKS})(?:$|_)|(?:password|passwd|secret)", re.IGNORECASE)

# A password may have a slash in it that nobody escaped; digits before a slash are a port.
_URL = re.compile(r"(?<=://)(?:[^:/?#\s@]*:(?!\d+/)[^\s@]*@|)(?:[^/?#\s]*@)?")
# What stands before a value, and the values that may follow it.
_QUOTED = r"\"[^\"]*\"|'[^']*'"
_PAIR = re.compile(
    r"(?P<quote>[\"']?)(?<![\w.\-])(?P<name>[\w.\-]+)(?P=quote)\s*[=:]\s*(?:(?:bearer|basic)\s+)?", re.IGNORECASE
)
_OF_PAIR = re.compile(rf"{_QUOTED}|[^\s&;,\"'\]}})]+")
_OPTION = re.compile(r"(?<!\S)(?P<name>--?[\w.\-]+)\s+")
_OF_OPTION = re.compile(rf"{_QUOTED}|(?!-)\S+")
_BEARER = re.compile(r"\b(?P<name>bearer|basic)(?P<between>\s+)(?P<value>[\w.~+/\-]{8,}=*)", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a name denotes a secret, however it is spelled: ``apiKey``, ``--password``, ``remote.secret_key``."""
    return _NAME.search(_words(name)) is not None


def masked(value: Any, name: str = "") -> Any:
    """``value`` without the secrets in it.

    Args:
        value: text, or lists and mappings of it; anything else stays as it is.
        name: what the value belongs to.
    """
    if name and is_secret(name) and value not in ("", None, True, False):
        # Sizes have such names too (``token_dim``), but none is called a password.
        can_be_size = isinstance(value, int | float) and not _LOCK.search(_words(name))
        if not can_be_size:
            return MASK
    if isinstance(value, str):
        return masked_text(value)
    if isinstance(value, Mapping):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        before = ["", *value][: len(value)]  # a command line names a secret in one element and has it in the next
        return [
            masked(item, option if isinstance(option, str) and option.startswith("-") and "=" not in option else "")
            for option, item in zip(before, value, strict=True)
        ]
    return value


def masked_text(text: str) -> str:
    """A text without the secrets in it."""
    text = _URL.sub("", text) if "@" in text else text
    for names, values in ((_PAIR, _OF_PAIR), (_OPTION, _OF_OPTION)):
        text = _mask_pairs(names, values, text)
    return _BEARER.sub(rf"\g<name>\g<between>{MASK}", text)


def _mask_pairs(names: re.Pattern[str], values: re.Pattern[str], text: str) -> str:
    """Masks the values of secret names; the value of any other name may hold such a pair, as a URL does."""
    parts, position = [], 0
    while name := names.search(text, position):
        value = values.match(text, name.end()) if is_secret(name["name"]) else None
        parts += [text[position : name.end()], MASK if value else ""]
        position = value.end() if value else name.end()
    return "".join([*parts, text[position:]])


def _words(name: str) -> str:
    """``apiKey``, ``api-key`` and ``api.key`` as ``api_key``."""
    return re.sub(r"[^A-Za-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)).strip("_")


class MaskingFilter(logging.Filter):
    """Lets every record pass without its secrets; for the handlers of libraries that know one."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = masked_text(record.getMessage()), None
        if record.exc_info:
            record.exc_text = masked_text(logging.Formatter().formatException(record.exc_info))
        return True
