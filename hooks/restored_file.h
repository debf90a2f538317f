/*
 * The restored WAL file: written under a private name beside its destination, which gets it only when it is whole.
 *
 * Nothing is fsynced here: PostgreSQL does that for a file it keeps. Source: KeepFileRestoredFromArchive() in
 * xlogarchive.c calls durable_rename() in fd.c, which fsyncs the file before the rename and its directory after.
 */
#ifndef PITR_RESTORED_FILE_H
#define PITR_RESTORED_FILE_H

#include <stdbool.h>
#include <stddef.h>

#include "call.h"

struct restored_file {
    int directory; /* file descriptor of the destination's directory */
    int fd;
    const char *name;    /* destination, in that directory */
    char temporary[64]; /* private name, likewise */
};

/* Create the private file. False if that cannot be done, as explained in `call`; so for all of these. */
bool create_restored_file(struct restored_file *file, struct call *call);

/* Append `size` bytes. */
bool write_restored_file(struct restored_file *file, struct call *call, const char *bytes, size_t size);

/* Close it, put it in its place, replacing what is there, and be done with it. */
bool publish_restored_file(struct restored_file *file, struct call *call);

/* Remove the private file, and be done with it. */
void discard_restored_file(struct restored_file *file);

#endif
