/*
 * The head of the agent's reply: status line and headers. No I/O: bytes in, facts out.
 */
#ifndef PITR_REPLY_HEAD_H
#define PITR_REPLY_HEAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NO_LENGTH UINT64_MAX

struct reply_head {
    int status;
    uint64_t content_length;  /* of the body in bytes, NO_LENGTH if it is not said */
    const char *wal_file;     /* value of HEADER_WAL_FILE, within the bytes given, or NULL */
    size_t wal_file_length;
};

/* Size of the head at the start of `bytes`, with the empty line that ends it; 0 if its end is not among them. */
size_t find_head_end(const char *bytes, size_t size);

/* Read the head that `bytes` is. False if it is not one, or not one that the agent would send. */
bool parse_reply_head(const char *bytes, size_t size, struct reply_head *head);

/* Tell whether the head says that the reply is about the WAL file `name`. */
bool is_about(const struct reply_head *head, const char *name);

#endif
