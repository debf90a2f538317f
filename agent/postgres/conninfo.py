"""Connection strings in libpq's form."""

from agent.errors import ConfigError


def split_password(conninfo: str) -> tuple[str, str | None]:
    """Return `conninfo`, a list of keywords or a URL, as keywords without the password, and the password.

    Raises:
        ConfigError: It cannot be understood. What it says is not told, for it may be a part of the password.
    """
    import psycopg
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    try:
        parameters = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        raise ConfigError(
            "PITR_PRIMARY_CONNINFO is no connection string",
            hint="Write for example host=postgres user=replicator password=..., or a postgresql:// URL.",
        ) from None
    password = parameters.pop("password", None)
    if password is not None and "\n" in str(password):
        raise ConfigError(
            "the password in PITR_PRIMARY_CONNINFO has a line break, which a password file cannot hold",
            hint="Give the role another password.",
        )
    return make_conninfo("", **parameters), None if password is None else str(password)


def password_line(password: str) -> str:
    """Return the line of a password file that gives `password` to every server. Source: libpq's "The Password File"."""
    escaped = password.replace("\\", "\\\\").replace(":", "\\:")
    return f"*:*:*:*:{escaped}\n"
