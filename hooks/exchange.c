#include "exchange.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "archived_file.h"
#include "protocol.h"
#include "reply_head.h"
#include "restored_file.h"

#define REPLY_HEAD_BYTES 8192
#define REPLY_TEXT_BYTES 448
#define BODY_PIECE_BYTES 65536
/* No WAL file is larger. Source: WalSegMaxSize in PostgreSQL's xlog_internal.h. */
#define WAL_FILE_BYTES_MAX (UINT64_C(1) << 30)

#define HINT_START "Start the agent, or correct PITR_SOCKET (--socket)."
#define HINT_MAY_CONNECT "Run PostgreSQL as the agent's user, or in the group of its socket."
#define HINT_AGENT_LOG "The agent's log says more."
#define HINT_VERSIONS "Use the hook and the agent of the same release, and check what listens on PITR_SOCKET."

struct reply {
    char bytes[REPLY_HEAD_BYTES]; /* the head and what of the body came with it */
    size_t received;
    size_t head_size;
    struct reply_head head;
};

bool is_socket_path(const char *path)
{
    return *path != '\0' && strlen(path) < sizeof ((struct sockaddr_un *)0)->sun_path;
}

static enum outcome connect_to_agent(struct call *call, int *fd)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    memcpy(address.sun_path, call->socket_path, strlen(call->socket_path) + 1);
    *fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    /* A unix socket connects at once or not at all: EAGAIN means that the agent has too many callers waiting. */
    if (*fd >= 0 && connect(*fd, (const struct sockaddr *)&address, sizeof address) == 0)
        return DONE;
    explain(call, errno == EACCES ? HINT_MAY_CONNECT : HINT_START, "cannot reach the agent at \"%s\": %s",
            call->socket_path, strerror(errno));
    if (*fd >= 0)
        (void)close(*fd);
    return AGAIN;
}

/* Wait until the socket is ready; DONE or LATE. */
static enum outcome wait_for_agent(struct call *call, int fd, short events)
{
    if (wait_ready(call, fd, events))
        return DONE;
    /* If the deadline came just after we asked once more, what the agent said before is the better reason. */
    if (*call->problem == '\0' || is_long_attempt(call))
        explain(call, HINT_AGENT_LOG, "the agent at \"%s\" does not answer", call->socket_path);
    return LATE;
}

static enum outcome send_bytes(struct call *call, int fd, const char *bytes, size_t size)
{
    while (size > 0) {
        ssize_t sent = send(fd, bytes, size, MSG_NOSIGNAL);
        if (sent >= 0) {
            bytes += sent;
            size -= (size_t)sent;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (wait_for_agent(call, fd, POLLOUT) == LATE)
                return LATE;
        } else if (errno != EINTR) {
            explain(call, HINT_START, "the agent dropped the request: %s", strerror(errno));
            return AGAIN;
        }
    }
    return DONE;
}

/*
 * Offer the private name as a place, unless the destination has the segment's own name: then it is not PostgreSQL that
 * asks but pg_rewind, which reads backwards, and needs nothing of what the agent would read ahead.
 */
static void offer_place(const struct call *call, const struct restored_file *file, char *header, size_t size)
{
    *header = '\0';
    if (strcmp(file->name, call->name) != 0 &&
        snprintf(header, size, HEADER_PLACE ": %ju:%ju:%s\r\n", (uintmax_t)file->device, (uintmax_t)file->inode,
                 file->temporary) < 0)
        *header = '\0';
}

/* Say which file is to be archived, in `header`. False if there is none, as explained in `call`. */
static bool name_file(struct call *call, char *header, size_t size)
{
    char file[64];

    return describe_archived_file(call, file, sizeof file) &&
           snprintf(header, size, "Content-Length: 0\r\n" HEADER_FILE ": %s\r\n", file) > 0;
}

/* `file` is NULL in an archive call. */
static enum outcome send_request(struct call *call, int fd, const struct restored_file *file)
{
    char request[512];
    char headers[192];
    int left = milliseconds_left(call);
    int size;

    if (file != NULL)
        offer_place(call, file, headers, sizeof headers);
    else if (!name_file(call, headers, sizeof headers))
        return FAILED;
    size = snprintf(request, sizeof request,
                    "%s " HOOK_PATH_PREFIX "%s HTTP/1.1\r\n"
                    "Host: pitr\r\n"
                    "Connection: close\r\n"
                    "%s" HEADER_DEADLINE ": %d\r\n"
                    "\r\n",
                    call->command == ARCHIVE ? "POST" : "GET", call->name, headers, left < 2000 ? 1 : left / 1000);

    if (size < 0 || (size_t)size >= sizeof request) {
        explain(call, HINT_VERSIONS, "the request does not fit");
        return FAILED;
    }
    return send_bytes(call, fd, request, (size_t)size);
}

/* Receive what is there, at least one byte, unless the outcome is another than DONE. */
static enum outcome receive(struct call *call, int fd, char *bytes, size_t size, size_t *received)
{
    for (;;) {
        ssize_t count = recv(fd, bytes, size, 0);
        if (count > 0) {
            *received = (size_t)count;
            return DONE;
        }
        if (count == 0) {
            explain(call, HINT_START, "the agent hung up before its answer was complete");
            return AGAIN;
        }
        if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (wait_for_agent(call, fd, POLLIN) == LATE)
                return LATE;
        } else if (errno != EINTR) {
            explain(call, HINT_START, "the agent broke off its answer: %s", strerror(errno));
            return AGAIN;
        }
    }
}

static enum outcome not_understood(struct call *call, const char *what)
{
    explain(call, HINT_VERSIONS, "the answer at \"%s\" is not understood: %s", call->socket_path, what);
    return FAILED;
}

static enum outcome receive_head(struct call *call, int fd, struct reply *reply)
{
    reply->received = 0;
    do {
        size_t count;
        enum outcome outcome;

        if (reply->received == sizeof reply->bytes)
            return not_understood(call, "its head is too long");
        outcome = receive(call, fd, reply->bytes + reply->received, sizeof reply->bytes - reply->received, &count);
        if (outcome != DONE)
            return outcome;
        reply->received += count;
        reply->head_size = find_head_end(reply->bytes, reply->received);
    } while (reply->head_size == 0);
    if (!parse_reply_head(reply->bytes, reply->head_size, &reply->head))
        return not_understood(call, "its head is not one of HTTP/1.1 with a plain body");
    return DONE;
}

/* Receive the first line of the body, or as much of it as fits and comes in time. */
static void receive_text(struct call *call, int fd, const struct reply *reply, char *text, size_t size)
{
    size_t most = reply->head.content_length < size ? (size_t)reply->head.content_length : size - 1;
    size_t used = reply->received - reply->head_size;

    if (used > most)
        used = most;
    memcpy(text, reply->bytes + reply->head_size, used);
    while (used < most && memchr(text, '\n', used) == NULL) {
        size_t count;
        if (receive(call, fd, text + used, most - used, &count) != DONE)
            break;
        used += count;
    }
    text[used] = '\0';
    used = strcspn(text, "\r\n");
    if (used > 0 && text[used - 1] == '.')
        used--; /* we end the sentence */
    text[used] = '\0';
}

/* Recovery is worth waiting until somebody has mended what is wrong; archive_command is asked anew by PostgreSQL. */
static bool is_worth_waiting(const struct call *call, int status)
{
    if (call->command == ARCHIVE)
        return status == STATUS_RETRY;
    return status != STATUS_WRONG_REQUEST && status != STATUS_DAMAGED;
}

static enum outcome refused(struct call *call, int fd, const struct reply *reply)
{
    char text[REPLY_TEXT_BYTES];

    receive_text(call, fd, reply, text, sizeof text);
    explain(call, HINT_AGENT_LOG, "the agent answered %d%s%s", reply->head.status, *text ? ": " : "", text);
    return is_worth_waiting(call, reply->head.status) ? AGAIN : FAILED;
}

/* Write the body to `file`, first what came with the head. */
static enum outcome receive_body(struct call *call, int fd, const struct reply *reply, struct restored_file *file)
{
    char piece[BODY_PIECE_BYTES];
    uint64_t missing = reply->head.content_length;
    size_t size = reply->received - reply->head_size;

    if (size > missing)
        return not_understood(call, "its body is longer than it says");
    if (!write_restored_file(file, call, reply->bytes + reply->head_size, size))
        return FAILED;
    for (missing -= size; missing > 0; missing -= size) {
        enum outcome outcome = receive(call, fd, piece, missing < sizeof piece ? (size_t)missing : sizeof piece, &size);
        if (outcome != DONE)
            return outcome;
        if (!write_restored_file(file, call, piece, size))
            return FAILED;
    }
    return DONE;
}

static enum outcome receive_file(struct call *call, int fd, const struct reply *reply, struct restored_file *file)
{
    enum outcome outcome;

    if (reply->head.content_length == 0 || reply->head.content_length > WAL_FILE_BYTES_MAX)
        return not_understood(call, "its Content-Length is not that of a WAL file");
    if (!create_restored_file(file, call))
        return FAILED;
    outcome = receive_body(call, fd, reply, file);
    if (outcome != DONE)
        return outcome;
    return publish_restored_file(file, call) ? DONE : FAILED;
}

static enum outcome carry_out(struct call *call, int fd, const struct reply *reply, struct restored_file *file)
{
    int status = reply->head.status;
    bool placed = status == STATUS_PLACED && file != NULL;
    bool absent = status == STATUS_ABSENT && file != NULL;

    if (!absent && !placed && status != STATUS_OK)
        return refused(call, fd, reply);
    if (!is_about(&reply->head, call->name))
        return not_understood(call, "it does not name the WAL file asked for");
    if (absent)
        return ABSENT;
    if (placed)
        return find_placed_file(file, call) && publish_restored_file(file, call) ? DONE : FAILED;
    return file == NULL ? DONE : receive_file(call, fd, reply, file);
}

static enum outcome converse(struct call *call, struct restored_file *file)
{
    struct reply reply;
    int fd;
    enum outcome outcome = connect_to_agent(call, &fd);

    if (outcome != DONE)
        return outcome;
    outcome = send_request(call, fd, file);
    if (outcome == DONE)
        outcome = receive_head(call, fd, &reply);
    if (outcome == DONE)
        outcome = carry_out(call, fd, &reply, file);
    (void)close(fd); /* only read from since the verdict */
    return outcome;
}

enum outcome ask_agent(struct call *call)
{
    struct restored_file file;
    enum outcome outcome;

    start_attempt(call);
    if (call->command == ARCHIVE)
        return converse(call, NULL);
    if (!prepare_restored_file(&file, call))
        return FAILED;
    outcome = converse(call, &file);
    end_restored_file(&file);
    return outcome;
}
