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
#include <sys/types.h>

#include "call.h"

struct restored_file {
    int directory; /* file descriptor of the destination's directory, */
    dev_t device;  /* and which directory that is */
    ino_t inode;
    int fd;             /* of the private file while we write it, else -1 */
    const char *name;   /* destination, in that directory */
    char temporary[64]; /* private name, likewise */
};

/* Open the destination's directory. False if that cannot be done, as explained in `call`; so for all of these. */
bool prepare_restored_file(struct restored_file *file, struct call *call);

/* Create the private file. */
bool create_restored_file(struct restored_file *file, struct call *call);

/* Find the private file that the agent was to put there. */
bool find_placed_file(struct restored_file *file, struct call *call);

/* Append `size` bytes. */
bool write_restored_file(struct restored_file *file, struct call *call, const char *bytes, size_t size);

/* Put it in its place, replacing what is there. */
bool publish_restored_file(struct restored_file *file, struct call *call);

/* Be done with it: remove the private file if there still is one. */
void end_restored_file(struct restored_file *file);

#endif
