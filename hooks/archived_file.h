/*
 * The WAL file that PostgreSQL hands over to be archived. Only the agent reads it; we tell which one is meant.
 */
#ifndef PITR_ARCHIVED_FILE_H
#define PITR_ARCHIVED_FILE_H

#include <stdbool.h>
#include <stddef.h>

#include "call.h"

/* Write what HEADER_FILE takes. False if there is no such file, as explained in `call`. */
bool describe_archived_file(struct call *call, char *text, size_t size);

#endif
