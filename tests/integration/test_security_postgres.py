"""PostgreSQL over TLS with a password, against a real server: the way in works, and every mistake is one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.errors import StamplineError
from pipeline.postgres import PostgresConnectionManager, tls_context
from pipeline.settings import Settings
from tests.fix_road import DEADLINE_SECONDS, environment
from tests.fix_secure import PASSWORD, USER, Certificates, SecurePostgres

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        shutil.which("java") is None or shutil.which("mvn") is None, reason="a PostgreSQL with TLS comes by Maven"
    ),
]

MakeSettings = Callable[..., Settings]
Shown = Literal["server", "elsewhere", "expired"]

_ROOT = Path(__file__).parents[2]
_WRONG = "a-wr0ng-passw0rd"


def migrate(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `stampline migrate` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "migrate", *arguments],
        cwd=_ROOT,
        env=environment(settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


async def describe_connection(settings: Settings) -> tuple[str, bool, str]:
    """Return as whom a pool of these settings comes in, whether over TLS, and how the password is kept."""
    async with PostgresConnectionManager(settings) as manager, manager.connection() as connection:
        row = await connection.fetchrow(
            "SELECT current_user::text, ssl, split_part(rolpassword, '$', 1) FROM pg_stat_ssl, pg_authid"
            " WHERE pid = pg_backend_pid() AND rolname = current_user"
        )
    assert row is not None
    return tuple(row)


async def test_the_pool_comes_in(
    secure_postgres: SecurePostgres, certificates: Certificates, make_secure_settings: MakeSettings
) -> None:
    """With the CA and the password every connection is encrypted."""
    settings = make_secure_settings(**secure_postgres.settings_for(certificates.ca))

    assert await describe_connection(settings) == (USER, True, "SCRAM-SHA-256")


async def test_a_connection_string_may_say_it_all(
    secure_postgres: SecurePostgres, certificates: Certificates, make_secure_settings: MakeSettings
) -> None:
    """POSTGRES_DSN with the CA in it verifies too, and ENABLE_SSL_DATABASE wins over what it says of TLS."""
    plain = secure_postgres.dsn
    by_string = make_secure_settings(postgres_dsn=f"{plain}?sslmode=verify-full&sslrootcert={certificates.ca}")
    by_variable = make_secure_settings(
        postgres_dsn=f"{plain}?sslmode=disable", enable_ssl_database=True, postgres_ssl_ca=certificates.ca
    )

    assert await describe_connection(by_string) == (USER, True, "SCRAM-SHA-256")
    assert await describe_connection(by_variable) == (USER, True, "SCRAM-SHA-256")


async def test_a_password_may_stand_in_a_file(
    secure_postgres: SecurePostgres, certificates: Certificates, make_secure_settings: MakeSettings, tmp_path: Path
) -> None:
    """POSTGRES_PASSWORD_FILE does for POSTGRES_PASSWORD, with the newline that editors put after it."""
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    by_file = {"postgres_password": None, "postgres_password_file": file}
    settings = make_secure_settings(**secure_postgres.settings_for(certificates.ca) | by_file)

    assert await describe_connection(settings) == (USER, True, "SCRAM-SHA-256")


async def test_the_ca_may_be_one_of_the_system(
    secure_postgres: SecurePostgres,
    certificates: Certificates,
    make_secure_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without POSTGRES_SSL_CA the CAs of the system count; here OpenSSL is told another place for them."""
    settings = make_secure_settings(**secure_postgres.settings_for(None))
    with pytest.raises(StamplineError, match="POSTGRES_SSL_CA"):
        await describe_connection(settings)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))

    assert await describe_connection(settings) == (USER, True, "SCRAM-SHA-256")


async def test_migrations_run_over_tls(
    secure_postgres: SecurePostgres, certificates: Certificates, make_secure_settings: MakeSettings
) -> None:
    """Up and down again: alembic has the same verified connection as the pool."""
    ours = {"postgres_db": await secure_postgres.make_database()}
    settings = make_secure_settings(**secure_postgres.settings_for(certificates.ca) | ours)
    for arguments in (("upgrade",), ("downgrade", "base", "--yes")):
        done = migrate(settings, *arguments)
        assert done.returncode == 0, done.stderr


def test_a_bad_ca_names_its_variable(make_secure_settings: MakeSettings, tmp_path: Path) -> None:
    """A file that is no certificate stops the start, with the name of the variable."""
    (tmp_path / "bad").write_text("no certificate")
    settings = make_secure_settings(enable_ssl_database=True, postgres_ssl_ca=tmp_path / "bad")

    with pytest.raises(StamplineError, match=r"POSTGRES_SSL_CA: .*bad is no CA certificate"):
        tls_context(settings)


@pytest.mark.parametrize(
    ("shown", "wrong", "texts"),
    [
        ("server", {"postgres_ssl_ca": "strange"}, ("is not trusted", "set POSTGRES_SSL_CA")),
        ("server", {"postgres_ssl_ca": None}, ("is not trusted", "set POSTGRES_SSL_CA")),
        (
            "elsewhere",
            {},
            ("another name (IP address mismatch, certificate is not valid for '127.0.0.1')", "POSTGRES_HOST"),
        ),
        ("expired", {}, ("is not valid today (certificate has expired)", "POSTGRES_SSL_CA")),
        ("server", {"postgres_password": _WRONG}, ("refuses user alice (password)", "POSTGRES_PASSWORD")),
        ("server", {"postgres_password": None}, ("refuses user alice (password)", "POSTGRES_PASSWORD")),
        ("server", {"postgres_user": "mallory"}, ("refuses user mallory", "POSTGRES_USER")),
        (
            "server",
            {"enable_ssl_database": False, "postgres_dsn": "plain"},
            ("refuses user alice", "no encryption", "set ENABLE_SSL_DATABASE=true"),
        ),
        (None, {}, ("does not speak TLS", "ENABLE_SSL_DATABASE=false")),
    ],
)
async def test_a_mistake_is_one_line(
    secure_postgres: SecurePostgres,
    make_secure_settings: MakeSettings,
    certificates: Certificates,
    *,
    shown: Shown | None,
    wrong: dict[str, Any],
    texts: tuple[str, ...],
) -> None:
    """Whatever does not fit, one line says what is wrong and which variable to look at, and never the password."""
    await secure_postgres.show(getattr(certificates, shown) if shown else None)
    strange = {"postgres_ssl_ca": certificates.strange_ca, "postgres_dsn": f"{secure_postgres.dsn}?sslmode=disable"}
    wrong = {name: strange[name] if value in {"strange", "plain"} else value for name, value in wrong.items()}
    settings = make_secure_settings(**(secure_postgres.settings_for(certificates.ca) | wrong))
    done = migrate(settings, "upgrade")

    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("stampline: ")
    for text in texts:
        assert text in line
    assert PASSWORD not in line
    assert _WRONG not in line
    with pytest.raises(StamplineError) as caught:
        await describe_connection(settings)
    assert line == f"stampline: {caught.value}"
