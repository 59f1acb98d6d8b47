"""The list of ended sessions in memory."""

from shared.security.revoked import Revocation, RevokedTokens


def test_an_entry_leaves_the_list_only_when_its_tokens_have_expired() -> None:
    revoked = RevokedTokens()
    revoked.add([Revocation("family:over", 1, -1.0), Revocation("family:ended", 1, 60.0)])
    revoked.forget_expired()
    assert len(revoked) == 1
    assert revoked.refuses([("family:ended", 0)])


def test_a_second_ending_of_a_session_keeps_the_later_end_and_the_higher_epoch() -> None:
    revoked = RevokedTokens()
    assert revoked.add([Revocation("user:one", 2, 60.0)])
    assert not revoked.add([Revocation("user:one", 1, -1.0)])
    revoked.forget_expired()
    assert revoked.refuses([("user:one", 1)])
    assert not revoked.refuses([("user:one", 2)])
