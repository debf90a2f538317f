/*
 * What hook and agent say to each other: HTTP/1.1 on a unix socket, one request a connection.
 *
 *   archive  POST /v1/wal/NAME   200 the file is durable in the repository
 *   restore  GET  /v1/wal/NAME   200 and the file as body; 410 no such file exists
 *   both                         503 not now, ask again; anything else: it failed, the body's first line says why
 *
 * 200 and 410 are verdicts only if they name, in HEADER_WAL_FILE, the file that was asked for.
 * agent/server/hook_api.py mirrors these constants; tests/hooks compares them.
 */
#ifndef PITR_PROTOCOL_H
#define PITR_PROTOCOL_H

#define DEFAULT_SOCKET "/run/pitr/agent.sock"
#define HOOK_PATH_PREFIX "/v1/wal/"
#define HEADER_WAL_FILE "Pitr-Wal-File" /* in a verdict: the file it is about */
#define HEADER_DEADLINE "Pitr-Deadline" /* in a request: whole seconds the hook still waits, at least 1 */

#define STATUS_OK 200
#define STATUS_ABSENT 410
#define STATUS_RETRY 503

#endif
