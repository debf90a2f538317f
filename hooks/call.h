/*
 * One call of the hook by PostgreSQL: what is asked, until when, and why it has not been answered yet.
 */
#ifndef PITR_CALL_H
#define PITR_CALL_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum command { ARCHIVE, RESTORE };

/* How an attempt, and in the end the call, came out. */
enum outcome {
    DONE,
    ABSENT, /* restore: the agent has seen that there is no such file */
    FAILED, /* asking again would change nothing */
    AGAIN,  /* not now: ask again */
    LATE    /* the deadline has passed */
};

struct call {
    enum command command;
    const char *name;        /* of the WAL file */
    const char *path;        /* where PostgreSQL has it, or wants it */
    const char *socket_path; /* of the agent */
    bool standby;            /* restore: PostgreSQL asks again by itself, unless it is about to promote */
    bool stopping;           /* PostgreSQL was seen stopping, and `deadline` brought forward */
    int64_t started;         /* milliseconds of the monotonic clock */
    int64_t asked;           /* likewise: when the current attempt began */
    int64_t deadline;        /* likewise */
    int patience;            /* seconds until the deadline, if nothing brings it forward */
    pid_t parent;            /* who asked */
    char problem[512];       /* why there is no verdict, */
    char hint[256];          /* and what to do about it: a sentence */
};

/* Start the clock: `seconds` from now, or less where PostgreSQL should not wait that long. */
void start_call(struct call *call, int seconds);

/* Begin an attempt to get an answer. */
void start_attempt(struct call *call);

/* Tell whether the current attempt has lasted long enough for its silence to mean something. */
bool is_long_attempt(const struct call *call);

/* Milliseconds until the deadline, 0 when it has passed. Takes notice of a shutdown, and of a promotion. */
int milliseconds_left(struct call *call);

/* Whole seconds since the call began. */
int seconds_spent(const struct call *call);

/* Wait until `fd` is ready for `events` (of poll). False if the deadline passed first. */
bool wait_ready(struct call *call, int fd, short events);

/* Wait `milliseconds`. False if the deadline passed first. */
bool wait_pause(struct call *call, int milliseconds);

/* Remember why there is no verdict: `problem` is a printf format, lower case and without a full stop. */
__attribute__((format(printf, 3, 4))) void explain(struct call *call, const char *hint, const char *problem, ...);

#endif
