#include "restored_file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define HINT_DIRECTORY "Check the volume's free space, and that PostgreSQL may write to this directory."
/*
 * A hook that is killed leaves its private file behind. PostgreSQL clears files of this name away when it starts after
 * a crash or an interrupted recovery. Its own have digits after the dot. Source: RemoveTempXlogFiles() in xlog.c.
 */
#define TEMPORARY_NAME "xlogtemp.pitr-%ld"

static bool fail(struct call *call, const char *what)
{
    explain(call, HINT_DIRECTORY, "cannot %s \"%s\": %s", what, call->path, strerror(errno));
    return false;
}

/* Open the directory of `path`, and point `name` at its last component. */
static int open_directory(const char *path, const char **name)
{
    const char *slash = strrchr(path, '/');
    char directory[PATH_MAX] = ".";
    size_t length;

    *name = slash == NULL ? path : slash + 1;
    if (slash != NULL) {
        length = slash == path ? 1 : (size_t)(slash - path);
        if (length >= sizeof directory) {
            errno = ENAMETOOLONG;
            return -1;
        }
        memcpy(directory, path, length);
        directory[length] = '\0';
    }
    return open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static int open_new(const struct restored_file *file)
{
    return openat(file->directory, file->temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                  S_IRUSR | S_IWUSR);
}

bool prepare_restored_file(struct restored_file *file, struct call *call)
{
    struct stat status;

    file->fd = -1;
    file->directory = open_directory(call->path, &file->name);
    if (file->directory < 0 || fstat(file->directory, &status) != 0) {
        fail(call, "open the directory of");
        if (file->directory >= 0)
            (void)close(file->directory);
        return false;
    }
    file->device = status.st_dev;
    file->inode = status.st_ino;
    if (snprintf(file->temporary, sizeof file->temporary, TEMPORARY_NAME, (long)getpid()) < 0)
        file->temporary[0] = '\0'; /* which cannot be opened */
    /* The name carries our process id, so whoever left such a file is gone. */
    (void)unlinkat(file->directory, file->temporary, 0);
    return true;
}

bool create_restored_file(struct restored_file *file, struct call *call)
{
    file->fd = open_new(file);
    return file->fd >= 0 || fail(call, "create a file beside");
}

bool find_placed_file(struct restored_file *file, struct call *call)
{
    struct stat status;

    if (fstatat(file->directory, file->temporary, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(status.st_mode) &&
        status.st_size > 0)
        return true;
    explain(call, HINT_DIRECTORY, "the agent did not put the file beside \"%s\", as it said", call->path);
    return false;
}

bool write_restored_file(struct restored_file *file, struct call *call, const char *bytes, size_t size)
{
    while (size > 0) {
        ssize_t written = write(file->fd, bytes, size);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return fail(call, "write the file for");
        bytes += written;
        size -= (size_t)written;
    }
    return true;
}

/* Every segment has the same destination: nothing may arrive there once PostgreSQL has gone on without us. */
static bool is_still_wanted(struct call *call)
{
    if (getppid() == call->parent)
        return true;
    explain(call, "Nothing is to be done: PostgreSQL asks anew when it needs the file.",
            "the PostgreSQL process that asked is gone");
    return false;
}

static bool close_file(struct restored_file *file)
{
    int fd = file->fd;

    file->fd = -1; /* closed even if that reports an error, on Linux */
    return fd < 0 || close(fd) == 0;
}

bool publish_restored_file(struct restored_file *file, struct call *call)
{
    if (!close_file(file))
        return fail(call, "close the file for");
    if (!is_still_wanted(call))
        return false;
    return renameat(file->directory, file->temporary, file->directory, file->name) == 0 ||
           fail(call, "rename the new file to");
}

void end_restored_file(struct restored_file *file)
{
    /* What fails here leaves a file that PostgreSQL clears away. */
    (void)close_file(file);
    (void)unlinkat(file->directory, file->temporary, 0);
    (void)close(file->directory);
}
