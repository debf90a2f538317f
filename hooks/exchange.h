/*
 * One request to the agent and what its reply means for the call.
 */
#ifndef PITR_EXCHANGE_H
#define PITR_EXCHANGE_H

#include <stdbool.h>

#include "call.h"

/* Tell whether `path` fits the address of a unix socket. */
bool is_socket_path(const char *path);

/*
 * Ask the agent once; for a restore, put the file it sends in its place.
 *
 * DONE or ABSENT is the agent's own word about this very file. With any other outcome `call` says what went wrong.
 */
enum outcome ask_agent(struct call *call);

#endif
