from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclip_secure import canonical
from fedclip_secure.errors import ConfigError
from fedclip_secure.pki.invitation import Invitation, secret_hash

INVITATION = Invitation("st-marys", bytes(range(32)), bytes(range(32, 64)))
TOKEN = INVITATION.encode()


def test_token_holds_the_whole_invitation() -> None:
    assert TOKEN.startswith("fedclip-")
    assert Invitation.decode(TOKEN) == INVITATION


def test_secrets_are_fresh_and_long() -> None:
    first, second = (Invitation.create("st-marys", bytes(32)).secret for _ in range(2))
    assert first != second
    assert len(first) == 32


def test_server_stores_a_labelled_hash_of_the_secret() -> None:
    assert INVITATION.secret_hash() == secret_hash(INVITATION.secret)
    assert secret_hash(INVITATION.secret) == canonical.digest("fedclip/v1/invitation-secret", INVITATION.secret)


def test_secret_does_not_show_in_messages() -> None:
    assert repr(INVITATION.secret) not in repr(INVITATION)


def test_line_breaks_of_a_mail_program_do_no_harm() -> None:
    assert Invitation.decode(f"  {TOKEN[:60]}\r\n {TOKEN[60:]}\n") == INVITATION


@pytest.mark.parametrize("end", range(len("fedclip-"), len(TOKEN)))
def test_truncated_token_is_told(end: int) -> None:
    with pytest.raises(ConfigError, match="cut short or mistyped"):
        Invitation.decode(TOKEN[:end])


@given(place=st.integers(8, len(TOKEN) - 2), letter=st.sampled_from("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789-_.!é"))
def test_mistyped_token_is_told(place: int, letter: str) -> None:
    typo = TOKEN[:place] + letter + TOKEN[place + 1 :]
    if typo != TOKEN:
        with pytest.raises(ConfigError, match="cut short or mistyped"):
            Invitation.decode(typo)


@given(st.text())
def test_any_text_is_an_invitation_or_an_error_in_words(text: str) -> None:
    for token in (text, f"fedclip-{text}"):
        with pytest.raises(ConfigError, match="the token"):
            Invitation.decode(token)


@pytest.mark.parametrize("name", ["aggregator", "St-Marys", "", "a" * 64, "st-marys\n", "../x"])
def test_name_that_no_silo_can_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a silo's name"):
        Invitation.create(name, bytes(32))


def test_fingerprint_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="32 bytes each"):
        Invitation.create("st-marys", bytes(20))
