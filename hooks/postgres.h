/*
 * What PostgreSQL's own names and files say. It runs its commands in the data directory, so its files are looked up in
 * the current one.
 */
#ifndef PITR_POSTGRES_H
#define PITR_POSTGRES_H

#include <stdbool.h>

/* Tell whether `name` is one of the four names that PostgreSQL gives to WAL files. */
bool is_wal_file_name(const char *name);

/* Tell whether this is a standby, which asks again by itself, and which exit codes above 125 would stop. */
bool postgres_is_standby(void);

/* Tell whether a standby was told to promote, and has not taken notice yet: it would take a failure for the WAL's end. */
bool postgres_is_promoting(void);

/* Tell whether a shutdown has begun, which waits for archive_command. */
bool postgres_is_stopping(void);

#endif
