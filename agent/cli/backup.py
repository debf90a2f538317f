"""`pitr backup`: the catalog, and a backup now."""

import typer

from agent.cli.loading import group_of

commands = typer.Typer(
    no_args_is_help=True,
    help="Take, list and look at base backups.",
    cls=group_of(
        {
            "list": "agent.cli.backup_list:list_backups",
            "now": "agent.cli.backup_now:backup_now",
            "cancel": "agent.cli.backup_now:cancel_backup",
            "show": "agent.cli.backup_by_name:show_backup",
            "pin": "agent.cli.backup_by_name:pin_backup",
            "unpin": "agent.cli.backup_by_name:unpin_backup",
            "delete": "agent.cli.backup_by_name:delete_backup",
        }
    ),
)
