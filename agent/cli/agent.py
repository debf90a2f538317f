"""`pitr agent`: the resident process."""

import uvloop

from agent.settings import Mode, load_settings
from agent.telemetry.logging import configure_logging


def agent_command() -> None:
    """Run the agent: PITR_MODE=archive (default) serves a primary, PITR_MODE=restore restores and ends."""
    settings = load_settings()
    configure_logging(settings.log_level)
    if settings.mode is Mode.RESTORE:
        from agent.restore_mode import restore  # only here: the resident agent keeps all that it loads

        uvloop.run(restore(settings, lambda _progress: None, http=True))
    else:
        from agent.app import run_archive_mode
        from agent.idle_memory import use_one_arena

        use_one_arena()
        uvloop.run(run_archive_mode(settings))
