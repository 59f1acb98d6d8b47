"""The rules for passwords and emails, and the form in which they are stored."""

import unicodedata

import pytest

from shared.errors import InvalidInput
from shared.security.emails import plain_email, read_email
from shared.security.passwords import check_new_password, fits, hash_password

EMAIL = "ada.lovelace@trattoria.example"


@pytest.mark.parametrize(
    "password",
    [
        "password1234",
        "1234567890",
        "QwertyUiop",
        "Password2024!",
        "manchester",
        "passwordpassword",
        "aaaaaaaaaaaaaaa",
        "abababababab",
        "ｐａｓｓｗｏｒｄ１２３４",  # full-width letters are the same in NFKC
    ],
)
def test_common_password_is_refused(password: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_new_password(password, EMAIL)
    assert refused.value.error_code == "password_common"


@pytest.mark.parametrize("password", [EMAIL, EMAIL.upper(), f" {EMAIL} ", "Ada.Lovelace"])
def test_email_is_refused_as_a_password(password: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_new_password(password, EMAIL)
    assert refused.value.error_code == "password_is_email"


@pytest.mark.parametrize(
    ("password", "words"),
    [("ninechars", "at least 10 characters"), ("e\u0301" * 9, "at least 10"), ("xy z" * 51, "at most 200 characters")],
)
def test_password_of_a_wrong_length_is_refused(password: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        check_new_password(password, EMAIL)


@pytest.mark.parametrize(
    "password", ["long enough to be good", "a long and unusual passphrase", "\0" + "🍕" * 99 + "!?", "tr4v-Ql.92"]
)
def test_other_passwords_are_accepted(password: str) -> None:
    check_new_password(password, EMAIL)


def test_password_is_the_same_in_every_form_of_unicode() -> None:
    password = "Grüße aus Ångström ﬁn"
    known = hash_password(unicodedata.normalize("NFD", password))
    assert all(fits(known, unicodedata.normalize(form, password)) for form in ("NFC", "NFD", "NFKC", "NFKD"))
    assert not fits(known, password.lower())


def test_spellings_of_an_email_are_one_email() -> None:
    for spelled in ("owner@example.com ", "\tOwner@EXAMPLE.com\n", "owner@example.com"):
        assert read_email(spelled) == plain_email(spelled) == "owner@example.com"
    assert plain_email("Stra\u00dfe@x.example") == plain_email("STRASSE@x.example")
    assert plain_email("e\u0301@x.example") == plain_email("\u00c9@x.example")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a@b",
        "a@b.",
        "@b.example",
        "a b@c.example",
        "a@b@c.example",
        "a\0@b.example",
        "a\u200b@b.example",
        "a@b..example",
        f"{'a' * 250}@x.example",
    ],
)
def test_invalid_email_is_refused_in_words(text: str) -> None:
    with pytest.raises(InvalidInput, match="not an email address") as refused:
        read_email(text, field="contact")
    assert refused.value.details == {"field": "contact"}
