"""Detects weak secrets, which production refuses: short ones, repetitive ones, and ones with common words."""

from urllib.parse import unquote, urlsplit

from shared.host_urls import host_urls

MIN_LENGTH_CHARS = 16
MIN_DIFFERENT_CHARS = 8
# These words come from examples, defaults and common passwords. A random text of 43 characters very probably contains
# none of them.
COMMON_WORDS = (
    "12345",
    "admin",
    "changeme",
    "default",
    "development",
    "example",
    "guest",
    "letmein",
    "passwor",
    "postgres",
    "qwert",
    "rabbitmq",
    "secret",
    "ticketrail",
)


def weakness(secret: str) -> str | None:
    """Returns why `secret` is weak, as the end of a sentence that begins with the setting, or None if it is strong.

    The text does not repeat the secret.
    """
    if not secret:
        return "is empty"
    if len(secret) < MIN_LENGTH_CHARS:
        return f"is shorter than {MIN_LENGTH_CHARS} characters"
    if len(set(secret)) < MIN_DIFFERENT_CHARS:
        return f"has fewer than {MIN_DIFFERENT_CHARS} different characters"
    plain = "".join(char for char in secret.lower() if char.isalnum())
    if any(word in plain for word in COMMON_WORDS):
        return "contains a common word that is easy to guess"
    return None


def passwords_in(urls: str) -> list[str]:
    """Returns the decoded password of each URL in a setting. The password is empty for a URL without one."""
    return [unquote(urlsplit(url).password or "") for url in host_urls(urls)]
