#include "call.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "postgres.h"

/* A standby waits no longer: it could stream from its primary instead. */
#define STANDBY_SECONDS 5
/*
 * Nor does a shutdown, which is held up by up to six calls: twice NUM_ARCHIVE_RETRIES, before and after the shutdown
 * checkpoint. The agent goes on with what it has begun. Source: pgarch_MainLoop() and pgarch_ArchiverCopyLoop() in
 * PostgreSQL's pgarch.c.
 */
#define STOPPING_SECONDS 2
/* An agent that has not answered for so long is silent rather than just asked. */
#define LONG_MILLISECONDS 1000
/* How often a waiting hook looks whether PostgreSQL is stopping. */
#define LOOK_MILLISECONDS 500

static int64_t monotonic_milliseconds(void)
{
    struct timespec now;

    if (clock_gettime(CLOCK_MONOTONIC, &now) != 0)
        return INT64_MAX; /* without a clock every deadline has passed */
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Make the deadline at most `seconds` from now. */
static void hurry(struct call *call, int seconds)
{
    int64_t now = monotonic_milliseconds();
    int64_t sooner = now < INT64_MAX - seconds * 1000 ? now + seconds * 1000 : INT64_MAX;

    if (sooner < call->deadline)
        call->deadline = sooner;
}

/* Make the deadline what it is where PostgreSQL can wait. */
static void take_time(struct call *call)
{
    call->deadline = INT64_MAX;
    hurry(call, call->patience);
}

void start_call(struct call *call, int seconds)
{
    call->parent = getppid();
    call->started = monotonic_milliseconds();
    call->patience = seconds;
    take_time(call);
    if (call->standby)
        hurry(call, STANDBY_SECONDS);
}

void start_attempt(struct call *call)
{
    call->asked = monotonic_milliseconds();
}

bool is_long_attempt(const struct call *call)
{
    return monotonic_milliseconds() - call->asked >= LONG_MILLISECONDS;
}

int milliseconds_left(struct call *call)
{
    int64_t left;

    /* A shutdown waits for the archiver, and the archiver for us. Source: PostmasterStateMachine() in postmaster.c. */
    if (call->command == ARCHIVE && !call->stopping && postgres_is_stopping()) {
        call->stopping = true;
        hurry(call, STOPPING_SECONDS);
    }
    /* A standby that was told to promote ends its recovery at the next failure, and loses what the archive has. */
    if (call->standby && postgres_is_promoting()) {
        call->standby = false;
        take_time(call);
    }
    left = call->deadline - monotonic_milliseconds();
    if (left <= 0)
        return 0;
    return left < INT_MAX ? (int)left : INT_MAX;
}

int seconds_spent(const struct call *call)
{
    return (int)((monotonic_milliseconds() - call->started) / 1000);
}

/* poll() until the deadline, or for `at_most` milliseconds: 1 ready, 0 not ready in that time, -1 deadline passed. */
static int poll_until_deadline(struct call *call, struct pollfd *polled, nfds_t count, int at_most)
{
    int left = milliseconds_left(call);
    int ready;

    if (left == 0)
        return -1;
    ready = poll(polled, count, left < at_most ? left : at_most);
    if (ready < 0 && errno != EINTR) {
        explain(call, "Give PostgreSQL's container more memory.", "cannot wait for the agent: %s", strerror(errno));
        return -1;
    }
    return ready > 0;
}

bool wait_ready(struct call *call, int fd, short events)
{
    struct pollfd polled = {.fd = fd, .events = events};
    int ready;

    do
        ready = poll_until_deadline(call, &polled, 1, LOOK_MILLISECONDS);
    while (ready == 0);
    return ready > 0;
}

bool wait_pause(struct call *call, int milliseconds)
{
    return poll_until_deadline(call, NULL, 0, milliseconds) == 0;
}

void explain(struct call *call, const char *hint, const char *problem, ...)
{
    va_list values;

    va_start(values, problem);
    if (vsnprintf(call->problem, sizeof call->problem, problem, values) < 0)
        call->problem[0] = '\0';
    va_end(values);
    if (snprintf(call->hint, sizeof call->hint, "%s", hint) < 0)
        call->hint[0] = '\0';
}
