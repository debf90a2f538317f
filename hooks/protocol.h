/*
 * What hook and agent say to each other: HTTP/1.1 on a unix socket, one request a connection.
 *
 *   archive  POST /v1/wal/NAME   200 the file is durable in the repository
 *   restore  GET  /v1/wal/NAME   200 and the file as body; 201 the file is where HEADER_PLACE said; 410 no such file
 *   both                         503 not now, ask again; anything else: it failed, the body's first line says why;
 *                                a restore asks again all the same until its deadline, except after 400 and 502
 *
 * 200, 201 and 410 are verdicts only if they name, in HEADER_WAL_FILE, the file that was asked for.
 * agent/server/hook_api.py mirrors these constants; tests/hooks compares them.
 */
#ifndef PITR_PROTOCOL_H
#define PITR_PROTOCOL_H

#define DEFAULT_SOCKET "/run/pitr/agent.sock"
#define HOOK_PATH_PREFIX "/v1/wal/"
#define HEADER_WAL_FILE "Pitr-Wal-File" /* in a verdict: the file it is about */
#define HEADER_DEADLINE "Pitr-Deadline" /* in a request: whole seconds the hook still waits, at least 1 */

/*
 * In a request to restore: DEVICE:INODE:NAME, a directory and a new name in it. If that directory is the agent's own
 * pg_wal, it may put a segment there, which it has on the same volume already, instead of sending its bytes.
 */
#define HEADER_PLACE "Pitr-Place"

/*
 * In a request to archive: SIZE:SECONDS.NANOSECONDS of the file that PostgreSQL hands over, its size and when it was
 * last modified. An agent that has another data directory's file of that name must not answer for it. Inode numbers
 * would not do: two copies of a volume have the same, and some container runtimes number files anew in each mount.
 */
#define HEADER_FILE "Pitr-File"

#define STATUS_OK 200
#define STATUS_PLACED 201
#define STATUS_ABSENT 410
#define STATUS_RETRY 503
#define STATUS_WRONG_REQUEST 400 /* restore: the same request would be as wrong again */
#define STATUS_DAMAGED 502       /* restore: what the archive holds is damaged, and stays so */

#endif
