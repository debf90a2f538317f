"""Archive and fetch for the hooks. The constants mirror hooks/protocol.h; a test compares them."""

HOOK_PATH_PREFIX = "/v1/wal/"
HEADER_WAL_FILE = "Pitr-Wal-File"  # names the file that a verdict (200, 410) is about
HEADER_DEADLINE = "Pitr-Deadline"  # whole seconds that the hook still waits
STATUS_OK = 200  # archived durably; or: the body is the file
STATUS_ABSENT = 410  # proven not to be in the archive; never a server's own 404
STATUS_RETRY = 503  # not now: ask again
