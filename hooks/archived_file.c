#include "archived_file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define HINT_FILE "Run archive_command in PostgreSQL's data directory, as PostgreSQL does."

bool describe_archived_file(struct call *call, char *text, size_t size)
{
    struct stat status;
    int length;

    if (fstatat(AT_FDCWD, call->path, &status, AT_SYMLINK_NOFOLLOW) != 0) {
        explain(call, HINT_FILE, "cannot look at \"%s\": %s", call->path, strerror(errno));
        return false;
    }
    length = snprintf(text, size, "%jd:%jd.%09ld", (intmax_t)status.st_size, (intmax_t)status.st_mtim.tv_sec,
                      status.st_mtim.tv_nsec);
    return length > 0 && (size_t)length < size;
}
