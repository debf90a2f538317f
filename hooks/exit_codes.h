/*
 * Exit codes: what PostgreSQL understands, and nothing else.
 *
 * restore_command: 1 to 125 is "not in the archive", which outside standby mode ENDS recovery and opens the server;
 * above 125 aborts recovery, and a later start resumes it. 143 would be read as SIGTERM, 126 and 127 as the shell's.
 * archive_command: 1 to 125 is a counted failure and asked again; above 125 restarts the archiver, uncounted.
 *
 * Source: RestoreArchivedFile() in PostgreSQL's xlogarchive.c; shell_archive_file() in shell_archive.c, before 15
 * pgarch_archiveXlog() in pgarch.c.
 */
#ifndef PITR_EXIT_CODES_H
#define PITR_EXIT_CODES_H

#define EXIT_ARCHIVED 0         /* durable in the repository: PostgreSQL may recycle the file */
#define EXIT_NOT_ARCHIVED 1     /* anything else: PostgreSQL keeps the file and asks again */
#define EXIT_RESTORED 0         /* the whole file is at PATH */
#define EXIT_ABSENT 1           /* the agent has seen that no such file exists */
#define EXIT_ABORT_RECOVERY 255 /* anything else until the deadline (400, 502: at once), outside standby mode */
#define EXIT_STANDBY_RETRY 1    /* anything else, in standby mode, where PostgreSQL asks again by itself, until it promotes */

#endif
