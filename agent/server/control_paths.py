"""Where the running agent is asked: for whoever asks, which needs nothing of what answers."""

BACKUPS_PATH = "/v1/backups"
CANCEL_PATH = "/v1/backups/cancel"
STATUS_PATH = "/v1/status"
