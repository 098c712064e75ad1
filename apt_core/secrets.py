"""Secrets of a profile: which values are some, and text and data without them.

A value is a secret by its type (``SecretStr`` and its kin in a plugin's model), by the name of its
key (``api_key``, ``password``, ``hf_token``), or as the credentials in a URL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet

MASK = "*" * 10
"""What stands in the place of a secret: as pydantic writes its own."""

SHORTEST = 6
"""Characters of a secret that is looked for in text: a shorter one would be found in words."""

MOST = 200
"""Secrets of a profile that are looked for in text."""


def words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


SECRET_WORDS = words_of(
    "password passwords passwd pwd passphrase passcode secret secrets credential credentials "
    "authorization bearer cookie cookies apikey apikeys authtoken accesstoken"
)
PLACES = words_of("file files path dir folder env name names var variable")
"""Last words of keys that say where a secret is: ``password_file``."""

KEY_OF = words_of(
    "api access secret private auth account signing encryption ssh service master shared storage "
    "subscription deploy license openai wandb hf huggingface neptune comet mlflow clearml trackio "
    "aws azure gcp"
)
"""Words before ``key`` that make it one which opens something: others are keys of tables."""

TOKEN_OF_TEXT = words_of(
    "pad padding eos bos eot eod eom eop bom unk unknown mask sep separator cls class special "
    "image audio video start begin end stop prompt per each first last next prev previous current "
    "at by every blank boundary control new newline fill filler prefix suffix middle fim system "
    "assistant role turn forced extra sentinel space word subword sub byte char input output "
    "target label query memory register summary think tool call quick sample draft ignore decoder "
    "of a the one token instruction response document delimiter reserved additional"
)
"""Words before ``token`` that make it one of a text."""

TOKENS_OF_ACCESS = words_of("access api auth bearer refresh bot personal")

QUERY_SECRETS = words_of("sig signature key x-amz-signature x-amz-credential")

CREDENTIALS = re.compile(r"(://[^\s/?#:@'\"]*:)[^\s/?#'\"]+@")
DATABASE = re.compile(
    r"((?:\b(?:postgres(?:ql)?|mysql|mariadb|oracle|mssql|cockroachdb|redshift|snowflake|clickhouse)"
    r"|\+(?!https?:|ssh:|file:)\w+)://[^\s/?#:@'\"]*:)[^\s'\"]+@"
)
"""As SQLAlchemy takes URLs: all up to the last @ is the password, escaped or not."""

USER_TOKEN = re.compile(r"(https?://)[^\s/?#:@'\"]{20,}@")
QUERY = re.compile(r"([?&;])([\w.\-]+)=([^&;\s#'\"]+)")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
ALL_STARS = re.compile(r"\*{8,}")


def is_secret_name(key: str) -> bool:
    """Whether a key of this name holds a secret.

    >>> [is_secret_name(key) for key in ("api_key", "hfToken", "pad_token", "max_tokens")]
    [True, True, False, False]
    """
    words = [word.lower() for word in WORD.findall(key)]
    if not words or words[-1] in PLACES:
        return False
    before, last = words[-2] if words[1:] else "", words[-1]
    if SECRET_WORDS.intersection(words):
        return True
    if last in ("key", "keys"):
        return before in KEY_OF
    if last == "token":
        return before not in TOKEN_OF_TEXT
    if last == "tokens":
        return before in TOKENS_OF_ACCESS
    return last in ("auth", "webhook") or (last in ("url", "uri") and before == "webhook")


def is_mask(value: object) -> bool:
    """Whether this replaces a secret, or is a URL with masked credentials."""
    if not isinstance(value, str):
        return False
    return ALL_STARS.fullmatch(value) is not None or f":{MASK}@" in value or f"/{MASK}@" in value


def without_secrets(value: Any, *, depth: int = 0) -> Any:
    """A copy of plain data in which secrets by name and credentials in URLs are masked.

    A section at the top is not judged by its own name.
    """
    if isinstance(value, Mapping):
        named = value.get("name", value.get("key"))
        pair = "value" in value and isinstance(named, str) and is_secret_name(named)
        return {
            key: _masked(item)
            if (is_secret(key, item) and (depth or not isinstance(item, Mapping)))
            or (pair and key == "value")
            else without_secrets(item, depth=depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item, depth=depth + 1) for item in value]
    return mask_urls(value) if isinstance(value, str) else value


def with_secrets(value: Any, actual: Any) -> Any:
    """Plain data with what ``actual`` has in the places of its masks."""
    if isinstance(value, Mapping):
        known = actual if isinstance(actual, Mapping) else {}
        return {key: with_secrets(item, known.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        items = actual if isinstance(actual, list) else []
        return [
            with_secrets(item, items[index] if index < len(items) else None)
            for index, item in enumerate(value)
        ]
    if value == MASK or (is_mask(value) and isinstance(actual, str) and mask_urls(actual) == value):
        return actual
    return value


def is_secret(key: object, value: object) -> bool:
    """Whether ``value`` is a secret by the name of its key. Numbers of tokens are not; parts of
    ``auth`` are judged by their own names."""
    if not isinstance(key, str) or not is_secret_name(key):
        return False
    last = WORD.findall(key)[-1].lower()
    if isinstance(value, int | float):
        return last not in ("token", "tokens")
    return last != "auth" or not isinstance(value, Mapping)


def _masked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return value if value is None or isinstance(value, bool) or value == "" else MASK


def mask_urls(text: str) -> str:
    """``text`` without the passwords, and the signatures, of the URLs in it.

    >>> mask_urls("postgres://ann:open@host/db")
    'postgres://ann:**********@host/db'
    """
    if "://" not in text:
        return text
    for credentials in (DATABASE, CREDENTIALS):
        text = credentials.sub(rf"\1{MASK}@", text)
    text = USER_TOKEN.sub(rf"\1{MASK}@", text)
    return QUERY.sub(_masked_query, text)


def _masked_query(match: re.Match[str]) -> str:
    sign, name, _ = match.groups()
    secret = is_secret_name(name) or name.lower() in QUERY_SECRETS
    return f"{sign}{name}={MASK}" if secret else match[0]


def mask_arguments(words: Sequence[str]) -> list[str]:
    """The arguments of a command without the secrets that they assign to keys.

    >>> mask_arguments(["--set", "a.api_key=x", "--a.password", "y", "--a.steps=3"])
    ['--set', 'a.api_key=**********', '--a.password', '**********', '--a.steps=3']
    """
    masked: list[str] = []
    hide = False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = is_secret_name(name.rpartition(".")[2]) and "." in name
        if hide and not word.startswith("--"):
            word = MASK
        elif equals and secret:
            word = f"{name}={MASK}"
        hide = secret and not equals and word.startswith("--")
        masked.append(redact(word))
    return masked


class SecretValues:
    """Secrets of a profile, which :func:`redact` takes out of text for as long as this object is
    kept: a plugin may put them into what it raises and logs."""

    def __init__(self) -> None:
        self._values: set[str] = set()
        _KEPT.add(self)

    def add(self, values: Iterable[object]) -> None:
        """Add values that are secrets; masks, those too short to be told, and too many are not."""
        for value in values:
            if len(self._values) >= MOST:
                return
            if isinstance(value, str) and len(value) >= SHORTEST and not is_mask(value):
                self._values.add(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)


_KEPT: WeakSet[SecretValues] = WeakSet()


def named_secrets(value: Any) -> Iterator[str]:
    """The texts in plain data that :func:`without_secrets` masks as a whole."""
    yield from hidden_in(value, without_secrets(value))


def hidden_in(value: Any, masked: Any) -> Iterator[str]:
    """The texts in plain data that are others in ``masked``, which is of the same form."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from hidden_in(item, masked[key])
    elif isinstance(value, list | tuple):
        for item, other in zip(value, masked, strict=True):
            yield from hidden_in(item, other)
    elif isinstance(value, str) and value != masked:
        yield value
        if masked != MASK:
            # Of a URL the password alone may be told, too.
            for credentials in (DATABASE, CREDENTIALS):
                yield from (match[0][len(match[1]) : -1] for match in credentials.finditer(value))


def redact(text: str) -> str:
    """``text`` without the secrets of the profiles in use and the credentials of URLs."""
    text = mask_urls(text)
    values = {value for kept in list(_KEPT) for value in kept}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK)
    return text
