"""The form in which an email is stored and looked up, and under which its sign-in attempts are counted."""


def plain_email(email: str) -> str:
    """Returns the email without blanks around it, in lower case as Python makes it. PostgreSQL's `lower` maps more
    spellings to one account than Python (İ becomes i), and each spelling would have its own attempts."""
    return email.strip().lower()
