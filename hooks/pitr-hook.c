/*
 * pitr-hook: what PostgreSQL runs as archive_command and restore_command.
 *
 * It asks the agent, waits, and turns one reply into one exit code (exit_codes.h), an unknown reply into the safe one.
 * All policy is in the agent. No heap, no threads, one deadline for everything, one line on stderr if it fails.
 * SIGTERM keeps its default action: PostgreSQL reads a hook that died of it as its own shutdown.
 * Source: RestoreArchivedFile() in PostgreSQL's xlogarchive.c.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "call.h"
#include "exchange.h"
#include "exit_codes.h"
#include "postgres.h"
#include "protocol.h"

#ifndef PITR_VERSION
#error "PITR_VERSION is not defined: build with hooks/hatch_build.py"
#endif

#define ARCHIVE_SECONDS 30
#define RESTORE_SECONDS 600
#define SECONDS_MAX 86400
#define FIRST_PAUSE_MILLISECONDS 20
#define LONGEST_PAUSE_MILLISECONDS 500
#define LINE_BYTES 1200

static const char usage[] =
    "usage: pitr-hook archive PATH NAME    archive_command = 'pitr-hook archive %p %f'\n"
    "       pitr-hook restore NAME PATH    restore_command = 'pitr-hook restore %f %p'\n"
    "\n"
    "Asks the pitr agent to make a WAL file durable in the repository, or to send it from there.\n"
    "\n"
    "  --socket SOCKET    unix socket of the agent; default $PITR_SOCKET, else " DEFAULT_SOCKET "\n"
    "  --timeout SECONDS  how long to wait for the agent; default $PITR_HOOK_TIMEOUT, else 30 to archive and 600 to\n"
    "                     restore; at most 2 to archive while PostgreSQL stops, and 5 to restore on a standby\n"
    "                     that is not told to promote\n"
    "  --version, --help  alone\n"
    "\n"
    "archive exits 0 when the file is durable, else 1.\n"
    "restore exits 0 when the file is there, 1 when the agent knows that no such file exists, else 255, which stops\n"
    "recovery (on a standby 1: PostgreSQL asks again; not when told to promote). A file that does not exist is normal and no line is printed.\n";

static bool is_same(const char *text, const char *other)
{
    return strcmp(text, other) == 0;
}

/* Write all of `text`, in one piece if it is no longer than a pipe takes. */
static bool put(int fd, const char *text, size_t size)
{
    while (size > 0) {
        ssize_t written = write(fd, text, size);
        if (written < 0 && errno != EINTR)
            return false;
        if (written > 0) {
            text += written;
            size -= (size_t)written;
        }
    }
    return true;
}

static const char *consequence(const struct call *call)
{
    if (call->command == ARCHIVE)
        return "PostgreSQL keeps the file and asks again.";
    if (call->standby)
        return "The standby asks again.";
    return "Recovery stops here and loses nothing: once this is mended, start PostgreSQL again.";
}

/* Print the one line, which goes to PostgreSQL's log: no control characters in it, whoever sent them. */
static void report(const struct call *call, enum outcome outcome)
{
    char line[LINE_BYTES], waited[32] = "";
    size_t length;

    if (outcome == LATE && snprintf(waited, sizeof waited, " (waited %d s)", seconds_spent(call)) < 0)
        waited[0] = '\0';
    if (snprintf(line, sizeof line - 1, "pitr-hook: %s%s%s: %s%s. %s %s", call->command == ARCHIVE ? "archive" : "restore",
                 *call->name ? " " : "", call->name, call->problem, waited, call->hint, consequence(call)) < 0)
        return;
    length = strlen(line);
    for (size_t at = 0; at < length; at++)
        if (line[at] < ' ' || line[at] > '~')
            line[at] = '?';
    line[length++] = '\n';
    (void)put(STDERR_FILENO, line, length); /* the exit code says it all the same */
}

static int exit_code(const struct call *call, enum outcome outcome)
{
    if (call->command == ARCHIVE)
        return outcome == DONE ? EXIT_ARCHIVED : EXIT_NOT_ARCHIVED;
    if (outcome == DONE)
        return EXIT_RESTORED;
    if (outcome == ABSENT)
        return EXIT_ABSENT;
    return call->standby ? EXIT_STANDBY_RETRY : EXIT_ABORT_RECOVERY;
}

static bool bad_usage(struct call *call, const char *problem, const char *value)
{
    explain(call, "See pitr-hook --help.", "%s: \"%s\"", problem, value);
    return false;
}

static bool parse_seconds(const char *text, int *seconds)
{
    char *end;
    long number;

    errno = 0;
    number = strtol(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != '\0' || errno != 0 || number < 1 || number > SECONDS_MAX)
        return false;
    *seconds = (int)number;
    return true;
}

/* An empty variable is as good as none. */
static const char *environment(const char *name, const char *otherwise)
{
    const char *value = getenv(name);

    return value == NULL || *value == '\0' ? otherwise : value;
}

/* Sort the arguments after the command into options and the two operands. */
static bool parse_arguments(struct call *call, char **arguments, const char **timeout, const char *operands[2])
{
    int count = 0;

    for (; *arguments != NULL; arguments++) {
        const char **option = is_same(*arguments, "--socket")    ? &call->socket_path
                              : is_same(*arguments, "--timeout") ? timeout
                                                                 : NULL;
        if (option != NULL) {
            if (arguments[1] == NULL)
                return bad_usage(call, "an option has no value", *arguments);
            *option = *++arguments;
        } else if (**arguments == '-')
            return bad_usage(call, "there is no such option", *arguments);
        else if (count == 2)
            return bad_usage(call, "there is an argument too many", *arguments);
        else
            operands[count++] = *arguments;
    }
    return count == 2 || bad_usage(call, "an argument is missing", call->command == ARCHIVE ? "PATH NAME" : "NAME PATH");
}

static bool check_operands(struct call *call)
{
    const char *slash = strrchr(call->path, '/');

    if (!is_wal_file_name(call->name))
        return bad_usage(call, "this is not the name of a WAL file", call->name);
    if (call->command == ARCHIVE && !is_same(slash == NULL ? call->path : slash + 1, call->name))
        return bad_usage(call, "this is not the path of that WAL file", call->path);
    if (!is_socket_path(call->socket_path))
        return bad_usage(call, "the path of the agent's socket has not 1 to 107 bytes", call->socket_path);
    return true;
}

/* Fill `call` from the arguments after the command and from the environment, and start its clock. */
static bool prepare(struct call *call, char **arguments)
{
    const char *operands[2] = {"", ""};
    const char *timeout = environment("PITR_HOOK_TIMEOUT", NULL);
    int seconds = call->command == ARCHIVE ? ARCHIVE_SECONDS : RESTORE_SECONDS;

    call->socket_path = environment("PITR_SOCKET", DEFAULT_SOCKET);
    if (!parse_arguments(call, arguments, &timeout, operands))
        return false;
    call->path = operands[call->command == ARCHIVE ? 0 : 1];
    call->name = operands[call->command == ARCHIVE ? 1 : 0];
    if (timeout != NULL && !parse_seconds(timeout, &seconds))
        return bad_usage(call, "the time-out is not a whole number of seconds from 1 to 86400", timeout);
    if (!check_operands(call))
        return false;
    start_call(call, seconds);
    return true;
}

static enum outcome ask_until_deadline(struct call *call)
{
    int pause = FIRST_PAUSE_MILLISECONDS;
    enum outcome outcome = ask_agent(call);

    while (outcome == AGAIN) {
        if (!wait_pause(call, pause))
            return LATE;
        pause = pause < LONGEST_PAUSE_MILLISECONDS / 2 ? 2 * pause : LONGEST_PAUSE_MILLISECONDS;
        outcome = ask_agent(call);
    }
    return outcome;
}

static int run(enum command command, char **arguments)
{
    struct call call = {.command = command, .name = ""};
    enum outcome outcome = FAILED;

    call.standby = command == RESTORE && postgres_is_standby();
    if (prepare(&call, arguments))
        outcome = ask_until_deadline(&call);
    if (outcome != DONE && outcome != ABSENT)
        report(&call, outcome);
    return exit_code(&call, outcome);
}

int main(int argc, char **argv)
{
    static const char version[] = "pitr-hook " PITR_VERSION "\n";

    if (signal(SIGPIPE, SIG_IGN) == SIG_ERR)
        return EXIT_ABORT_RECOVERY;
    /* Only alone, lest an archive_command that says --help by mistake exits 0. */
    if (argc == 2 && is_same(argv[1], "--version"))
        return put(STDOUT_FILENO, version, sizeof version - 1) ? EXIT_SUCCESS : EXIT_FAILURE;
    if (argc == 2 && is_same(argv[1], "--help"))
        return put(STDOUT_FILENO, usage, sizeof usage - 1) ? EXIT_SUCCESS : EXIT_FAILURE;
    if (argc > 1 && is_same(argv[1], "archive"))
        return run(ARCHIVE, argv + 2);
    if (argc > 1 && is_same(argv[1], "restore"))
        return run(RESTORE, argv + 2);
    (void)put(STDERR_FILENO, usage, strcspn(usage, "\n") + 1);
    return EXIT_ABORT_RECOVERY; /* no archive_command takes this for success, and no restore_command for absence */
}
