#include "postgres.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#define SEGMENT_DIGITS 24
#define TIMELINE_DIGITS 8
#define OFFSET_DIGITS 8

/* Source: LOCK_FILE_LINE_PM_STATUS and PM_STATUS_STOPPING in PostgreSQL's src/include/utils/pidfile.h. */
#define STATUS_LINE 8
#define STATUS_STOPPING "stopping"
/* The lines before it hold two paths and some numbers. */
#define PID_FILE_BYTES 8192

static size_t count_hex_digits(const char *text)
{
    return strspn(text, "0123456789ABCDEF");
}

/* Source: IsXLogFileName(), IsPartialXLogFileName(), IsTLHistoryFileName(), IsBackupHistoryFileName(), xlog_internal.h. */
bool is_wal_file_name(const char *name)
{
    size_t digits = count_hex_digits(name);
    const char *suffix = name + digits;

    if (digits == TIMELINE_DIGITS)
        return strcmp(suffix, ".history") == 0;
    if (digits != SEGMENT_DIGITS)
        return false;
    if (*suffix == '\0' || strcmp(suffix, ".partial") == 0)
        return true;
    return *suffix == '.' && count_hex_digits(suffix + 1) == OFFSET_DIGITS &&
           strcmp(suffix + 1 + OFFSET_DIGITS, ".backup") == 0;
}

/* Source: readRecoverySignalFile() in xlogrecovery.c: standby.signal decides, whether recovery.signal is there or not. */
bool postgres_is_standby(void)
{
    return access("standby.signal", F_OK) == 0;
}

/*
 * The file is there from pg_promote() or pg_ctl promote until the startup process has read it. That is after a failure
 * of ours, so whoever promotes while no primary streams is seen here. Source: PROMOTE_SIGNAL_FILE in xlog.h,
 * WaitForWALToBecomeAvailable() and CheckForStandbyTrigger() in xlogrecovery.c (before 15: xlog.c).
 */
bool postgres_is_promoting(void)
{
    return access("promote", F_OK) == 0;
}

/* Read up to `size` bytes of a small file; what cannot be read counts as not there. */
static size_t read_start(const char *path, char *content, size_t size)
{
    size_t used = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

    if (fd < 0)
        return 0;
    while (used < size) {
        ssize_t count = read(fd, content + used, size - used);
        if (count > 0)
            used += (size_t)count;
        else if (count == 0 || errno != EINTR)
            break;
    }
    return close(fd) == 0 ? used : 0;
}

bool postgres_is_stopping(void)
{
    char content[PID_FILE_BYTES];
    const char *end = content + read_start("postmaster.pid", content, sizeof content);
    const char *line = content;

    for (int number = 1; number < STATUS_LINE; number++) {
        const char *newline = memchr(line, '\n', (size_t)(end - line));
        if (newline == NULL)
            return false;
        line = newline + 1;
    }
    return (size_t)(end - line) >= strlen(STATUS_STOPPING) &&
           memcmp(line, STATUS_STOPPING, strlen(STATUS_STOPPING)) == 0;
}
