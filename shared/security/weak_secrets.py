"""Which secrets are refused in production: those that a guesser tries first, or would soon get to."""

from urllib.parse import unquote, urlsplit

from shared.host_urls import host_urls

LEAST_LENGTH = 16
LEAST_DIFFERENT = 8
# Parts of examples, defaults and of what people type; in 43 random characters none of them turns up by chance.
WELL_KNOWN = (
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
    """What is wrong with it, in words that do not repeat it; None when nothing is."""
    if not secret:
        return "is empty"
    if len(secret) < LEAST_LENGTH:
        return f"is shorter than {LEAST_LENGTH} characters"
    if len(set(secret)) < LEAST_DIFFERENT:
        return f"has fewer than {LEAST_DIFFERENT} different characters"
    plain = "".join(char for char in secret.lower() if char.isalnum())
    if any(word in plain for word in WELL_KNOWN):
        return "contains a word that guessers try first"
    return None


def passwords_in(urls: str) -> list[str]:
    """The password of a URL, or of each of several, decoded; empty where there is none."""
    return [unquote(urlsplit(url).password or "") for url in host_urls(urls)]
